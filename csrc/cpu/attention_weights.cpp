// lsmha_fast_C::attention_weights: softmax weights averaged over the heads, with the heads' outputs
// from the same pass where they are asked for; and the gradient of the weights.

#include "attention_arguments.h"
#include "attention_weights.h"

#include <torch/csrc/stable/library.h>

namespace {

void check_weights(const Tensor& t, const Tensor& q, const Tensor& k, const char* name) {
  STD_TORCH_CHECK(q.scalar_type() != ScalarType::Double, "q must be float32 or bfloat16");
  check_small(t, q.scalar_type(), {q.size(0), q.size(2), k.size(2)}, true, name);
}

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
void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options,
                 std::optional<Tensor>& out, Tensor& lse, Tensor& weights) {
  const auto call = make_call<T, float>(q, k, v, options);
  const auto o = out ? writable<T>(*out) : HeadsOf<T>{};
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

// without v and out: the weights alone
void attention_weights(Tensor q, Tensor k, Optional v, Optional key_mask, Optional bias,
                       Optional head_scale, Optional seed, int64_t threshold, double keep_factor,
                       double scale, Optional out, Tensor lse, Tensor weights) {
  const Options options{key_mask, bias, head_scale, seed, threshold, keep_factor, scale};
  const Tensor values = v ? *v : k;
  check(q, k, values, options);
  if (out) check_heads(*out, q, q.size(2), "out");
  check_small(lse, ScalarType::Float, {q.size(0), q.size(1), q.size(2)}, true, "lse");
  check_weights(weights, q, k, "weights");
  q.scalar_type() == ScalarType::Float
      ? run_forward<float>(q, k, values, options, out, lse, weights)
      : run_forward<Bfloat16>(q, k, values, options, out, lse, weights);
}

template <class T>
void run_backward(const Tensor& dweights, const Tensor& q, const Tensor& k, const Options& options,
                  Tensor& dq_tensor, Tensor& dk_tensor, Optional& dbias) {
  const auto call = make_call<T, float>(q, k, k, options);
  const auto *grads = static_cast<const T*>(dweights.const_data_ptr());
  const auto dq = writable<T>(dq_tensor), dk = writable<T>(dk_tensor);
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

void attention_weights_backward(Tensor dweights, Tensor q, Tensor k, Optional key_mask,
                                Optional bias, Optional seed, int64_t threshold,
                                double keep_factor, double scale, Tensor dq, Tensor dk,
                                Optional dbias) {
  const Options options{key_mask, bias, {}, seed, threshold, keep_factor, scale};
  check(q, k, k, options);
  check_weights(dweights, q, k, "dweights");
  check_heads(dq, q, q.size(2), "dq");
  check_heads(dk, q, k.size(2), "dk");
  if (dbias) check_bias_gradient(q, k, *dbias);
  q.scalar_type() == ScalarType::Float
      ? run_backward<float>(dweights, q, k, options, dq, dk, dbias)
      : run_backward<Bfloat16>(dweights, q, k, options, dq, dk, dbias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C, m) {
  m.def("attention_weights(Tensor q, Tensor k, Tensor? v, Tensor? key_mask, Tensor? bias,"
        " Tensor? head_scale, Tensor? seed, int threshold, float keep_factor, float scale,"
        " Tensor(a!)? out, Tensor(b!) lse, Tensor(c!) weights) -> ()");
  m.def("attention_weights_backward(Tensor dweights, Tensor q, Tensor k, Tensor? key_mask,"
        " Tensor? bias, Tensor? seed, int threshold, float keep_factor, float scale,"
        " Tensor(a!) dq, Tensor(b!) dk, Tensor(c!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C, CPU, m) {
  m.impl("attention_weights", TORCH_BOX(&attention_weights));
  m.impl("attention_weights_backward", TORCH_BOX(&attention_weights_backward));
}
