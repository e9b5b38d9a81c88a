// The tensors of an attention operator: checked, turned into calls, and divided into tasks.

#pragma once

#include "attention_head.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

// the types of the stable ABI have hidden visibility
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// weights below which another thread does not pay
constexpr int64_t GRAIN = 1 << 15;

struct Options {
  Optional key_mask, bias, head_scale, seed;
  int64_t threshold;
  double keep_factor, scale;
};

inline void check_heads(const Tensor& t, const Tensor& q, int64_t N, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == q.size(1) &&
                      t.size(2) == N && t.size(3) == q.size(3) &&
                      t.scalar_type() == q.scalar_type() && (t.size(3) == 1 || t.stride(3) == 1),
                  name, " must be (B, H, N, D) like q, in its dtype, with a dense last dimension");
}

inline void check_small(const Optional& t, ScalarType dtype, std::initializer_list<int64_t> sizes,
                 bool contiguous, const char* name) {
  if (!t) return;
  bool fits = t->is_cpu() && t->scalar_type() == dtype && (t->is_contiguous() || !contiguous) &&
              t->dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = t->size(d) == sizes.begin()[d];
  STD_TORCH_CHECK(fits, name, " has the wrong shape, dtype or strides");
}

ScalarType accumulator(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Double,
                  "q must be float32, bfloat16 or float64");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.numel() > 0 && k.numel() > 0,
                  "q and k must be (B, H, N, D) and not empty");
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), S = k.size(2);
  check_heads(q, q, L, "q");
  check_heads(k, q, S, "k");
  check_heads(v, q, S, "v");
  check_small(o.key_mask, ScalarType::Bool, {B, S}, true, "key_mask");
  check_small(o.bias, accumulator(q), {B, H, L, S}, false, "bias");
  check_small(o.head_scale, accumulator(q), {H}, true, "head_scale");
  check_small(o.seed, ScalarType::Long, {1}, true, "seed");
  STD_TORCH_CHECK(0 <= o.threshold && o.threshold < 65536, "threshold must fit 16 bits");
}

template <class T>
HeadsOf<const T> readable(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
HeadsOf<T> writable(Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

template <class P>
const P* data_or_null(const Optional& t) {
  return t ? static_cast<const P*>(t->const_data_ptr()) : nullptr;
}

template <class T, class Acc>
AttentionCall<T, Acc> make_call(const Tensor& q, const Tensor& k, const Tensor& v,
                                const Options& o) {
  AttentionCall<T, Acc> call{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3)};
  call.q = readable<T>(q), call.k = readable<T>(k), call.v = readable<T>(v);
  call.key_mask = data_or_null<bool>(o.key_mask);
  call.bias = data_or_null<Acc>(o.bias);
  for (int d = 0; d < 4; ++d) call.bias_stride[d] = o.bias ? o.bias->stride(d) : 0;
  call.head_scale = data_or_null<Acc>(o.head_scale);
  call.seed = data_or_null<int64_t>(o.seed);
  call.threshold = o.threshold;
  call.keep_factor = o.keep_factor;
  call.scale = o.scale;
  return call;
}

// Calls f(first, last) for parts of the tasks in parallel.
template <class F>
void for_tasks(int64_t tasks, int64_t weights_of_task, const F& f) {
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, GRAIN / weights_of_task), f);
}

// Neighbouring heads that a thread takes at once: what fills a cache line, if enough groups remain.
int64_t group_of(int64_t B, int64_t H, int64_t D) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(std::min(B * H / (4 * threads), PAD / std::min(D, PAD)), 1, H);
}

// The heads of a call in fp32: out, and log-sum-exp (B, H, L).
template <class T>
void attend_heads(const AttentionCall<T, float>& call, const HeadsOf<T>& out, float* lse) {
  const int64_t group = group_of(call.B, call.H, call.D);
  const int64_t groups = (call.H + group - 1) / group;
  for_tasks(call.B * groups, group * call.L * call.S, [&](int64_t first, int64_t last) {
    VectorHeads<T> heads(call, group);
    for (int64_t t = first; t < last; ++t) {
      const int64_t h = t % groups * group;
      heads.forward(t / groups, h, std::min(group, call.H - h), out, lse);
    }
  });
}

// Heads that share a part of the bias gradient, one after the other in one task: no sum depends on
// the number of threads. Without a bias gradient a task is a group of neighbouring heads.
template <class Acc>
class BackwardTasks {
 public:
  // dbias: (parts, B or 1, H or 1, L or 1, S or 1), contiguous, or nothing
  BackwardTasks(const Tensor& q, Optional& dbias)
      : B_(q.size(0)), H_(q.size(1)), group_(dbias ? 1 : group_of(B_, H_, q.size(3))) {
    if (!dbias) return;
    data_ = static_cast<Acc*>(dbias->mutable_data_ptr());
    parts_ = dbias->size(0);
    images_ = dbias->size(1), heads_ = dbias->size(2);
    grad_.l = dbias->size(3) > 1 ? dbias->size(4) : 0;
    grad_.s = dbias->size(4) > 1 ? 1 : 0;
    size_ = dbias->size(3) * dbias->size(4);
  }

  int64_t group() const { return group_; }
  int64_t count() const { return data_ ? parts_ * images_ * heads_ : B_ * groups(); }

  // f(b, h, count, where their bias gradient goes) for all heads of a task, count at a time
  template <class F>
  void for_heads(int64_t task, const F& f) const {
    if (!data_) {
      const int64_t h = task % groups() * group_;
      return f(task / groups(), h, std::min(group_, H_ - h), grad_);
    }
    BiasGradient<Acc> grad = grad_;
    grad.data = data_ + task * size_;
    const int64_t h0 = task % heads_, b0 = task / heads_ % images_, part = task / heads_ / images_;
    const int64_t over_h = H_ / heads_, terms = over_h * (B_ / images_);
    for (int64_t t = part * terms / parts_; t < (part + 1) * terms / parts_; ++t) {
      f(images_ == 1 ? t / over_h : b0, heads_ == 1 ? t % over_h : h0, 1, grad);
    }
  }

 private:
  int64_t groups() const { return (H_ + group_ - 1) / group_; }

  const int64_t B_, H_, group_;
  int64_t parts_ = 1, images_ = 1, heads_ = 1, size_ = 0;
  Acc* data_ = nullptr;
  BiasGradient<Acc> grad_;
};

inline void check_bias_gradient(const Tensor& q, const Tensor& k, const Tensor& dbias) {
  const int64_t full[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  bool fits = dbias.is_cpu() && dbias.dim() == 5 && dbias.is_contiguous() && dbias.size(0) > 0 &&
              dbias.scalar_type() == accumulator(q);
  for (int d = 0; fits && d < 4; ++d) {
    fits = dbias.size(d + 1) == 1 || dbias.size(d + 1) == full[d];
  }
  STD_TORCH_CHECK(fits, "dbias must be a contiguous (parts, B or 1, H or 1, L or 1, S or 1)");
}

}  // namespace
