// lsmha_fast::attention, attention_packed and their gradients for the CPU: overloads `cpp`.

#include "attention_arguments.h"
#include "attention_head.h"
#include "attention_plain.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

namespace {

struct QKV {
  Heads q, k, v;
};

template <class T>
void run_forward(const QKV& in, const Options& options, const Heads& out, void* lse) {
  const auto call = make_call<T, float>(in.q, in.k, in.v, options);
  const auto o = out.of<T>();
  float* sums = static_cast<float*>(lse);
  const int64_t group = group_of(call.B, call.H, call.D);
  const int64_t groups = (call.H + group - 1) / group;
  for_tasks(call.B * groups, group * call.L * call.S, [&](int64_t first, int64_t last) {
    VectorHeads<T> heads(call, group);
    for (int64_t t = first; t < last; ++t) {
      const int64_t h = t % groups * group;
      heads.forward(t / groups, h, std::min(group, call.H - h), o, sums);
    }
  });
}

template <>
void run_forward<double>(const QKV& in, const Options& options, const Heads& out, void* lse) {
  const auto call = make_call<double, double>(in.q, in.k, in.v, options);
  const auto o = out.of<double>();
  double* sums = static_cast<double*>(lse);
  for_tasks(call.B * call.H, call.L * call.S, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      PlainHead(call, t / call.H, t % call.H).forward(o, sums + t * call.L);
    }
  });
}

// fills out and returns the log-sum-exp
Tensor forward(const QKV& in, const Options& options, Tensor& out_tensor, const Heads& out) {
  check(in.q, in.k, in.v, options);
  Tensor lse = lse_like(in.q);
  if (in.q.empty() || in.k.empty()) {
    torch::stable::zero_(out_tensor);
    return torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  auto* run = in.q.dtype == ScalarType::Float      ? run_forward<float>
              : in.q.dtype == ScalarType::BFloat16 ? run_forward<Bfloat16>
                                                   : run_forward<double>;
  run(in, options, out, lse.mutable_data_ptr());
  return lse;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, Optional key_mask, Optional bias,
                                     Optional head_scale, Optional seed, double dropout_p,
                                     double scale) {
  q = dense(q), k = dense(k), v = dense(v);
  const QKV in{q, k, v};
  const Options options(in.q, key_mask, bias, head_scale, seed, dropout_p, scale);
  Tensor out = heads_last(in.q);
  Tensor lse = forward(in, options, out, out);
  return {out, lse};
}

QKV parts_of(const Tensor& packed) {
  STD_TORCH_CHECK(packed.dim() == 5 && packed.size(2) == 3, "qkv must be (B, N, 3, H, D)");
  return {Heads::part(packed, 0), Heads::part(packed, 1), Heads::part(packed, 2)};
}

std::tuple<Tensor, Tensor> attention_packed(Tensor qkv, Optional key_mask, Optional bias,
                                            Optional head_scale, Optional seed, double dropout_p,
                                            double scale) {
  qkv = dense(qkv);
  const QKV in = parts_of(qkv);
  const Options options(in.q, key_mask, bias, head_scale, seed, dropout_p, scale);
  Tensor out = new_tensor(in.q.dtype, {in.q.B, in.q.N, in.q.H, in.q.D});
  Tensor lse = forward(in, options, out, Heads::tokens(out));
  return {out, lse};
}

struct Gradients {
  Heads dout, out;
  const Tensor& lse;
  QKV to;
  Optional dbias, dhead_scale;
};

template <class T, class Acc>
AttentionBackwardCall<T, Acc> make_backward_call(const QKV& in, const Options& options,
                                                 const Gradients& g) {
  AttentionBackwardCall<T, Acc> call{make_call<T, Acc>(in.q, in.k, in.v, options)};
  call.dout = g.dout.of<const T>(), call.out = g.out.of<const T>();
  call.lse = static_cast<const Acc*>(g.lse.const_data_ptr());
  call.dq = g.to.q.of<T>(), call.dk = g.to.k.of<T>(), call.dv = g.to.v.of<T>();
  if (g.dhead_scale) call.dhead_scale = static_cast<Acc*>(g.dhead_scale->mutable_data_ptr());
  return call;
}

template <class T>
void run_backward(const QKV& in, const Options& options, const Gradients& g) {
  const auto call = make_backward_call<T, float>(in, options, g);
  const BackwardTasks<float> tasks(in.q, g.dbias);
  for_tasks(tasks.count(), tasks.group() * call.L * call.S, [&](int64_t first, int64_t last) {
    VectorHeads<T> heads(call, tasks.group());
    for (int64_t t = first; t < last; ++t) {
      tasks.for_heads(t, [&](int64_t b, int64_t h, int64_t n, const BiasGradient<float>& dbias) {
        heads.backward(b, h, n, call, dbias);
      });
    }
  });
}

template <>
void run_backward<double>(const QKV& in, const Options& options, const Gradients& g) {
  const auto call = make_backward_call<double, double>(in, options, g);
  const BackwardTasks<double> tasks(in.q, g.dbias);
  for_tasks(tasks.count(), call.L * call.S, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      tasks.for_heads(t, [&](int64_t b, int64_t h, int64_t n, const BiasGradient<double>& dbias) {
        for (int64_t end = h + n; h < end; ++h) PlainHead(call, b, h).backward(call, dbias);
      });
    }
  });
}

// fills `to`, or zeros the tensors that it lies in; returns dbias and dhead_scale
std::tuple<Tensor, Tensor> backward(const QKV& in, const Options& options, const Heads& dout,
                                    const Heads& out, const Tensor& lse, const QKV& to,
                                    std::initializer_list<Tensor> buffers, const Optional& bias,
                                    const Optional& head_scale, bool bias_grad) {
  check(in.q, in.k, in.v, options);
  check_heads(dout, in.q, in.q.N, "do");
  check_heads(out, in.q, in.q.N, "o");
  check_small(lse, accumulator(in.q), {in.q.B, in.q.H, in.q.N}, "lse");
  Gradients g{dout, out, lse, to, bias_parts(in.q, options, bias_grad), {}};
  if (head_scale) g.dhead_scale = torch::stable::new_zeros(lse, {in.q.B, in.q.H});
  if (in.q.empty() || in.k.empty()) {
    for (Tensor buffer : buffers) torch::stable::zero_(buffer);
  } else {
    auto* run = in.q.dtype == ScalarType::Float      ? run_backward<float>
                : in.q.dtype == ScalarType::BFloat16 ? run_backward<Bfloat16>
                                                     : run_backward<double>;
    run(in, options, g);
  }
  return {sum_of_parts(g.dbias, bias, in.q), sum_of_parts(g.dhead_scale, head_scale, in.q)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor dout, Tensor q, Tensor k, Tensor v, Optional key_mask, Optional bias,
    Optional head_scale, Optional seed, double dropout_p, double scale, Tensor out, Tensor lse,
    bool bias_grad) {
  dout = dense(dout), q = dense(q), k = dense(k), v = dense(v), out = dense(out);
  const QKV in{q, k, v};
  const Options options(in.q, key_mask, bias, head_scale, seed, dropout_p, scale);
  const Tensor dq = heads_last(in.q), dk = heads_last(in.k), dv = heads_last(in.v);
  auto [dbias, dhead_scale] = backward(in, options, dout, out, lse, {dq, dk, dv}, {dq, dk, dv},
                                       bias, head_scale, bias_grad);
  return {dq, dk, dv, dbias, dhead_scale};
}

std::tuple<Tensor, Tensor, Tensor> attention_packed_backward(
    Tensor dout, Tensor qkv, Optional key_mask, Optional bias, Optional head_scale, Optional seed,
    double dropout_p, double scale, Tensor out, Tensor lse, bool bias_grad) {
  dout = dense(dout), qkv = dense(qkv), out = dense(out);
  const QKV in = parts_of(qkv);
  const Options options(in.q, key_mask, bias, head_scale, seed, dropout_p, scale);
  const Tensor dqkv = new_tensor(in.q.dtype, {in.q.B, in.q.N, 3, in.q.H, in.q.D});
  auto [dbias, dhead_scale] =
      backward(in, options, Heads::tokens(dout), Heads::tokens(out), lse, parts_of(dqkv), {dqkv},
               bias, head_scale, bias_grad);
  return {dqkv, dbias, dhead_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast, CPU, m) {
  m.impl("attention.cpp", TORCH_BOX(&attention));
  m.impl("attention_backward.cpp", TORCH_BOX(&attention_backward));
  m.impl("attention_packed.cpp", TORCH_BOX(&attention_packed));
  m.impl("attention_packed_backward.cpp", TORCH_BOX(&attention_packed_backward));
}
