// The tensors of an attention operator: checked, turned into calls, and divided into tasks.

#pragma once

#include "attention_head.h"
#include "new_tensor.h"

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

// A (B, H, N, D) tensor, or one of the three in a packed (B, N, 3, H, D) one, as it lies in memory;
// it keeps nothing alive.
struct Heads {
  ScalarType dtype;
  bool readable = false;  // four dimensions on the CPU, the last one dense or nothing at all
  int64_t B = 0, H = 0, N = 0, D = 0, stride_b = 0, stride_h = 0, stride_n = 0;
  void* data = nullptr;

  Heads(const Tensor& t) : Heads(t, 4, 1, 2, 0) {}

  // a (B, N, H, D) tensor
  static Heads tokens(const Tensor& t) { return {t, 4, 2, 1, 0}; }

  // q, k or v, by number, of a (B, N, 3, H, D) tensor
  static Heads part(const Tensor& packed, int64_t index) { return {packed, 5, 3, 1, index}; }

  bool empty() const { return B * H * N * D == 0; }

  template <class T>
  HeadsOf<T> of() const {
    return {static_cast<T*>(data), stride_b, stride_h, stride_n};
  }

 private:
  // h, n: the dimensions of heads and tokens
  Heads(const Tensor& t, size_t dims, size_t h, size_t n, int64_t index) : dtype(t.scalar_type()) {
    const auto size = t.sizes(), stride = t.strides();
    if (size.size() != dims || !t.is_cpu()) return;
    B = size[0], H = size[h], N = size[n], D = size[dims - 1];
    stride_b = stride[0], stride_h = stride[h], stride_n = stride[n];
    readable = D == 1 || stride[dims - 1] == 1 || empty();
    data = const_cast<void*>(t.const_data_ptr());
    if (index > 0) data = static_cast<char*>(data) + index * stride[2] * bytes_of(dtype);
  }

  static int64_t bytes_of(ScalarType type) {
    return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  }
};

inline void check_heads(const Heads& t, const Heads& q, int64_t N, const char* name) {
  STD_TORCH_CHECK(t.readable && t.B == q.B && t.H == q.H && t.N == N && t.D == q.D &&
                      t.dtype == q.dtype,
                  name, " must be (B, H, N, D) like q, in its dtype, with a dense last dimension");
}

inline void check_small(const Optional& t, ScalarType dtype, std::initializer_list<int64_t> sizes,
                 const char* name) {
  if (!t) return;
  bool fits = t->is_cpu() && t->scalar_type() == dtype && t->is_contiguous() &&
              t->dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = t->size(d) == sizes.begin()[d];
  STD_TORCH_CHECK(fits, name, " has the wrong shape, dtype or strides");
}

ScalarType accumulator(const Heads& q) {
  return q.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// what the kernels take beside q, k and v, in the dtypes that they compute in
struct Options {
  Optional key_mask, bias, head_scale, seed;
  int64_t threshold = 0;
  double keep_factor = 1.0, scale;

  Options(const Heads& q, const Optional& mask, const Optional& bias_, const Optional& factors,
          const Optional& seed_, double dropout_p, double scale_)
      : bias(bias_), head_scale(factors), seed(seed_), scale(scale_) {
    if (mask) key_mask = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
    for (Optional* t : {&bias, &head_scale}) {
      if (*t && (*t)->scalar_type() != accumulator(q)) *t = torch::stable::to(**t, accumulator(q));
    }
    if (head_scale) head_scale = torch::stable::contiguous(*head_scale);
    if (!seed) return;
    // the probability is rounded to a multiple of 2^-16, as `common.dropout_rule` does it
    const double rounded = std::nearbyint(dropout_p * 65536);
    // 16 bits cannot say "drop all", the factor 0 does
    threshold = std::min<int64_t>(static_cast<int64_t>(rounded), 65535);
    keep_factor = rounded < 65536 ? 65536 / (65536 - rounded) : 0.0;
  }
};

// whether a bias has four dimensions, each 1 or that of the scores
inline bool broadcasts(const Tensor& bias, const Heads& q, const Heads& k) {
  const int64_t full[] = {q.B, q.H, q.N, k.N};
  bool fits = bias.is_cpu() && bias.dim() == 4;
  for (int64_t d = 0; fits && d < 4; ++d) fits = bias.size(d) == 1 || bias.size(d) == full[d];
  return fits;
}

inline void check(const Heads& q, const Heads& k, const Heads& v, const Options& o) {
  STD_TORCH_CHECK(q.dtype == ScalarType::Float || q.dtype == ScalarType::BFloat16 ||
                      q.dtype == ScalarType::Double,
                  "q must be float32, bfloat16 or float64");
  check_heads(q, q, q.N, "q");
  check_heads(k, q, k.N, "k");
  check_heads(v, q, k.N, "v");
  check_small(o.key_mask, ScalarType::Bool, {q.B, k.N}, "key_mask");
  STD_TORCH_CHECK(!o.bias || (o.bias->scalar_type() == accumulator(q) && broadcasts(*o.bias, q, k)),
                  "bias has the wrong shape or dtype");
  check_small(o.head_scale, accumulator(q), {q.H}, "head_scale");
  check_small(o.seed, ScalarType::Long, {1}, "seed");
  STD_TORCH_CHECK(0 <= o.threshold, "dropout_p must be a probability");
}

template <class P>
const P* data_or_null(const Optional& t) {
  return t ? static_cast<const P*>(t->const_data_ptr()) : nullptr;
}

template <class T, class Acc>
AttentionCall<T, Acc> make_call(const Heads& q, const Heads& k, const Heads& v, const Options& o) {
  AttentionCall<T, Acc> call{q.B, q.H, q.N, k.N, q.D};
  call.q = q.of<const T>(), call.k = k.of<const T>(), call.v = v.of<const T>();
  call.key_mask = data_or_null<bool>(o.key_mask);
  call.bias = data_or_null<Acc>(o.bias);
  for (int d = 0; d < 4; ++d) {
    call.bias_stride[d] = o.bias && o.bias->size(d) > 1 ? o.bias->stride(d) : 0;
  }
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
  BackwardTasks(const Heads& q, const Optional& dbias)
      : B_(q.B), H_(q.H), group_(dbias ? 1 : group_of(B_, H_, q.D)) {
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

// sums of the bias gradient that may run in parallel; fixed, so that no bit depends on the threads
constexpr int64_t BIAS_PARTS = 16;

// Zeros to add up the bias gradient in, (parts, *bias.shape), where it was asked for.
inline Optional bias_parts(const Heads& q, const Options& options, bool bias_grad) {
  if (!bias_grad || !options.bias) return {};
  const Tensor& bias = *options.bias;
  const int64_t terms = q.B * q.H / std::max<int64_t>(1, bias.size(0) * bias.size(1));
  return torch::stable::new_zeros(bias, {std::min(terms, BIAS_PARTS), bias.size(0), bias.size(1),
                                         bias.size(2), bias.size(3)});
}

// The sum over the parts in the dtype of `like`; an empty tensor where nobody asked for it.
inline Tensor sum_of_parts(const Optional& parts, const Optional& like, const Heads& q) {
  if (!parts || !like) return new_tensor(q.dtype, {0});
  const int64_t first[] = {0};
  const Tensor sum = torch::stable::sum(*parts, first);
  return sum.scalar_type() == like->scalar_type() ? sum
                                                  : torch::stable::to(sum, like->scalar_type());
}

// A new (B, H, N, D) whose memory is (B, N, H, D), so that merging the heads is free.
inline Tensor heads_last(const Heads& t) {
  const int64_t row = t.H * t.D;
  const int64_t strides[] = {t.N * row, t.D, row, 1};
  return new_strided(t.dtype, {t.B, t.H, t.N, t.D}, strides);
}

inline Tensor lse_like(const Heads& q) {
  return new_tensor(accumulator(q), {q.B, q.H, q.N});
}

// the kernels take any strides but need dense channels
inline Tensor dense(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  const size_t last = size.size() - 1;
  return size.size() == 0 || size[last] == 1 || stride[last] == 1 ? t
                                                                  : torch::stable::contiguous(t);
}

}  // namespace
