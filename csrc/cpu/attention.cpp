// lsmha_fast_C::attention and its gradient. All results go to tensors that the caller made, so that a
// gradient can be written into a packed one.

#include "attention_arguments.h"
#include "attention_plain.h"

#include <torch/csrc/stable/library.h>

namespace {

template <class T>
void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options,
                 Tensor& out, Tensor& lse) {
  const auto call = make_call<T, float>(q, k, v, options);
  const auto o = writable<T>(out);
  float* sums = lse.mutable_data_ptr<float>();
  attend_heads(call, o, sums);
}

template <>
void run_forward<double>(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options,
                         Tensor& out, Tensor& lse) {
  const auto call = make_call<double, double>(q, k, v, options);
  const auto o = writable<double>(out);
  double* sums = lse.mutable_data_ptr<double>();
  for_tasks(call.B * call.H, call.L * call.S, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      PlainHead(call, t / call.H, t % call.H).forward(o, sums + t * call.L);
    }
  });
}

void attention(Tensor q, Tensor k, Tensor v, Optional key_mask, Optional bias, Optional head_scale,
               Optional seed, int64_t threshold, double keep_factor, double scale, Tensor out,
               Tensor lse) {
  const Options options{key_mask, bias, head_scale, seed, threshold, keep_factor, scale};
  check(q, k, v, options);
  check_heads(out, q, q.size(2), "out");
  check_small(lse, accumulator(q), {q.size(0), q.size(1), q.size(2)}, true, "lse");
  switch (q.scalar_type()) {
    case ScalarType::Float: return run_forward<float>(q, k, v, options, out, lse);
    case ScalarType::BFloat16: return run_forward<Bfloat16>(q, k, v, options, out, lse);
    default: return run_forward<double>(q, k, v, options, out, lse);
  }
}

struct Gradients {
  Tensor dout, out, lse, dq, dk, dv;
  Optional dbias, dhead_scale;
};

template <class T, class Acc>
AttentionBackwardCall<T, Acc> make_backward_call(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Options& options, Gradients& g) {
  AttentionBackwardCall<T, Acc> call{make_call<T, Acc>(q, k, v, options)};
  call.dout = readable<T>(g.dout), call.out = readable<T>(g.out);
  call.lse = static_cast<const Acc*>(g.lse.const_data_ptr());
  call.dq = writable<T>(g.dq), call.dk = writable<T>(g.dk), call.dv = writable<T>(g.dv);
  if (g.dhead_scale) call.dhead_scale = static_cast<Acc*>(g.dhead_scale->mutable_data_ptr());
  return call;
}

template <class T>
void run_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options,
                  Gradients& g) {
  const auto call = make_backward_call<T, float>(q, k, v, options, g);
  const BackwardTasks<float> tasks(q, g.dbias);
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
void run_backward<double>(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options,
                          Gradients& g) {
  const auto call = make_backward_call<double, double>(q, k, v, options, g);
  const BackwardTasks<double> tasks(q, g.dbias);
  for_tasks(tasks.count(), call.L * call.S, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      tasks.for_heads(t, [&](int64_t b, int64_t h, int64_t n, const BiasGradient<double>& dbias) {
        for (int64_t end = h + n; h < end; ++h) PlainHead(call, b, h).backward(call, dbias);
      });
    }
  });
}

void attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Optional key_mask, Optional bias,
                        Optional head_scale, Optional seed, int64_t threshold, double keep_factor,
                        double scale, Tensor out, Tensor lse, Tensor dq, Tensor dk, Tensor dv,
                        Optional dbias, Optional dhead_scale) {
  const Options options{key_mask, bias, head_scale, seed, threshold, keep_factor, scale};
  Gradients g{dout, out, lse, dq, dk, dv, dbias, dhead_scale};
  check(q, k, v, options);
  const int64_t L = q.size(2), S = k.size(2);
  check_heads(dout, q, L, "dout");
  check_heads(out, q, L, "out");
  check_heads(dq, q, L, "dq");
  check_heads(dk, q, S, "dk");
  check_heads(dv, q, S, "dv");
  check_small(lse, accumulator(q), {q.size(0), q.size(1), L}, true, "lse");
  check_small(dhead_scale, accumulator(q), {q.size(0), q.size(1)}, true, "dhead_scale");
  if (dbias) check_bias_gradient(q, k, *dbias);
  switch (q.scalar_type()) {
    case ScalarType::Float: return run_backward<float>(q, k, v, options, g);
    case ScalarType::BFloat16: return run_backward<Bfloat16>(q, k, v, options, g);
    default: return run_backward<double>(q, k, v, options, g);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias,"
        " Tensor? head_scale, Tensor? seed, int threshold, float keep_factor, float scale,"
        " Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? key_mask,"
        " Tensor? bias, Tensor? head_scale, Tensor? seed, int threshold, float keep_factor,"
        " float scale, Tensor out, Tensor lse, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv,"
        " Tensor(d!)? dbias, Tensor(e!)? dhead_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
