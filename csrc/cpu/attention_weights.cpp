// lsmha_fast::attention_weights for the CPU, overloads `cpp`: softmax weights averaged over the heads, with the heads' outputs
// from the same pass where they are asked for; and the gradient of the weights.

#include "attention_arguments.h"
#include "attention_weights.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

namespace {

// what a summed weight is multiplied by
float weight_factor(const Options& options, int64_t H) {
  return static_cast<float>((options.seed ? options.keep_factor : 1.0) / static_cast<double>(H));
}

// Queries of a task, which loads all keys and values: few, that threads share an image, but with
// enough weights to pay for it. Batch and threads do not enter, so that no bit depends on them.
// Dropout's bits are counted from the first query.
int64_t rows_of(const Options& options, int64_t H, int64_t L, int64_t S) {
  const int64_t rows = padded(std::max(L / 4, 2 * GRAIN / (H * S)));
  return options.seed ? L : std::clamp<int64_t>(rows, 2 * PAD, 8 * PAD);
}

template <class T>
void run_forward(const Heads& q, const Heads& k, const Heads& v, const Options& options,
                 const std::optional<Heads>& out, Tensor& lse, Tensor& weights) {
  const auto call = make_call<T, float>(q, k, v, options);
  const auto o = out ? out->of<T>() : HeadsOf<T>{};
  auto* average = static_cast<T*>(weights.mutable_data_ptr());
  float* sums = lse.mutable_data_ptr<float>();
  const int64_t L = call.L, rows = rows_of(options, call.H, L, call.S);
  const int64_t parts = (L + rows - 1) / rows;
  const int64_t group = std::clamp<int64_t>(PAD / call.D, 1, call.H);
  for_tasks(call.B * parts, call.H * rows * call.S, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t b = t / parts, i = t % parts * rows;
      auto part = call;
      auto part_o = o;
      part.L = std::min(rows, L - i);
      part.q.data += i * call.q.stride_n;
      if (part.bias) part.bias += i * call.bias_stride[2];
      if (part_o.data) part_o.data += i * o.stride_n;
      WeightHeads<T>(part, group).forward(b, part_o, sums + b * call.H * L + i, L,
                                          average + (b * L + i) * call.S,
                                          weight_factor(options, call.H));
    }
  });
}

void check_weights(const Heads& q, const Heads& k, const Heads& v, const Options& options) {
  STD_TORCH_CHECK(q.dtype != ScalarType::Double, "q must be float32 or bfloat16");
  check(q, k, v, options);
}

// averaged weights and log-sum-exp; fills the heads' outputs where they are asked for
std::tuple<Tensor, Tensor> forward(const Heads& q, const Heads& k, const Heads& v,
                                   const Options& options, Optional out) {
  check_weights(q, k, v, options);
  Tensor weights = new_tensor(q.dtype, {q.B, q.N, k.N});
  Tensor lse = lse_like(q);
  if (q.empty() || k.empty()) {
    torch::stable::zero_(weights);
    if (out) torch::stable::zero_(*out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  } else {
    auto* run = q.dtype == ScalarType::Float ? run_forward<float> : run_forward<Bfloat16>;
    run(q, k, v, options, out ? std::optional<Heads>(*out) : std::nullopt, lse, weights);
  }
  return {weights, lse};
}

std::tuple<Tensor, Tensor> attention_weights(Tensor q, Tensor k, Optional key_mask, Optional bias,
                                             Optional seed, double dropout_p, double scale) {
  q = dense(q), k = dense(k);
  return forward(q, k, k, {q, key_mask, bias, {}, seed, dropout_p, scale}, {});
}

std::tuple<Tensor, Tensor, Tensor> attention_with_weights(Tensor q, Tensor k, Tensor v,
                                                          Optional key_mask, Optional bias,
                                                          Optional head_scale, Optional seed,
                                                          double dropout_p, double scale) {
  q = dense(q), k = dense(k), v = dense(v);
  const Tensor out = heads_last(q);
  auto [weights, lse] =
      forward(q, k, v, {q, key_mask, bias, head_scale, seed, dropout_p, scale}, out);
  return {out, weights, lse};
}

template <class T>
void run_backward(const Tensor& dweights, const Heads& q, const Heads& k, const Options& options,
                  const Heads& dq_heads, const Heads& dk_heads, const Optional& dbias) {
  const auto call = make_call<T, float>(q, k, k, options);
  const auto* grads = static_cast<const T*>(dweights.const_data_ptr());
  const auto dq = dq_heads.of<T>(), dk = dk_heads.of<T>();
  const BackwardTasks<float> tasks(q, dbias);
  const float factor = weight_factor(options, call.H);
  for_tasks(tasks.count(), tasks.group() * call.L * call.S, [&](int64_t first, int64_t last) {
    WeightHeads<T> heads(call, tasks.group());
    for (int64_t t = first; t < last; ++t) {
      tasks.for_heads(t, [&](int64_t b, int64_t h, int64_t n, const BiasGradient<float>& to) {
        heads.backward(b, h, n, grads + b * call.L * call.S, factor, dq, dk, to);
      });
    }
  });
}

// the log-sum-exp is not needed: the kernel sums a row before it takes its weights
std::tuple<Tensor, Tensor, Tensor> attention_weights_backward(
    Tensor dweights, Tensor q_tensor, Tensor k_tensor, Optional key_mask, Optional bias,
    Optional seed, double dropout_p, double scale, Tensor, bool bias_grad) {
  dweights = torch::stable::contiguous(dweights);
  q_tensor = dense(q_tensor), k_tensor = dense(k_tensor);
  const Heads q(q_tensor), k(k_tensor);
  const Options options(q, key_mask, bias, {}, seed, dropout_p, scale);
  check_weights(q, k, k, options);
  check_small(dweights, q.dtype, {q.B, q.N, k.N}, "dweights");
  const Tensor dq = heads_last(q), dk = heads_last(k);
  const Optional dbias = bias_parts(q, options, bias_grad);
  if (q.empty() || k.empty()) {
    for (Tensor gradient : {dq, dk}) torch::stable::zero_(gradient);
  } else {
    auto* run = q.dtype == ScalarType::Float ? run_backward<float> : run_backward<Bfloat16>;
    run(dweights, q, k, options, dq, dk, dbias);
  }
  return {dq, dk, sum_of_parts(dbias, bias, q)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast, CPU, m) {
  m.impl("attention_weights.cpp", TORCH_BOX(&attention_weights));
  m.impl("attention_weights_backward.cpp", TORCH_BOX(&attention_weights_backward));
  m.impl("attention_with_weights.cpp", TORCH_BOX(&attention_with_weights));
}
