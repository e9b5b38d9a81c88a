// One head in fp32: its tensors brought into the form that the kernels take, and the results back.

#pragma once

#include "attention_call.h"

// Kept by a thread from head to head.
template <class T>
class VectorHead {
 public:
  using Call = AttentionCall<T, float>;
  using Backward = AttentionBackwardCall<T, float>;

  explicit VectorHead(const Call& call)
      : call_(call),
        width_(width_of(call.D)),
        padded_l_(padded(call.L)),
        queries_(width_ * padded_l_),
        keys_(padded(call.S * width_)),
        memory_(7 * queries_ + 4 * keys_ + 2 * padded_l_),
        keep_(call.seed ? call.S * padded_l_ / PAD : 0) {}

  void forward(int64_t b, int64_t h, const HeadsOf<T>& out, float* lse) {
    const AttentionHead head = load_head(b, h);
    float *o = part(1), *sums = part(7) + 4 * keys_;
    attention_kernels().forward(head, o, sums);
    std::copy(sums, sums + call_.L, lse);
    store_queries(o, 1.0f, out.head(b, h), out.stride_n);
  }

  void backward(int64_t b, int64_t h, const Backward& g, const BiasGradient<float>& dbias) {
    const AttentionHead head = load_head(b, h);
    float *dout = part(2), *dq = part(3), *q_rows = part(4), *dout_rows = part(5);
    float *dk = part(7) + 2 * keys_, *dv = dk + keys_, *lse = dv + keys_, *delta = lse + padded_l_;
    load_queries(g.dout.head(b, h), g.dout.stride_n, 1.0f, dout);
    if (width_ > MAX_FUSED) {
      load_rows(call_.q.head(b, h), call_.q.stride_n, logit_scale(), q_rows);
      load_rows(g.dout.head(b, h), g.dout.stride_n, 1.0f, dout_rows);
    }
    const float* saved = g.lse + (b * call_.H + h) * call_.L;
    std::fill(lse, lse + 2 * padded_l_, 0.0f);
    std::copy(saved, saved + call_.L, lse);
    add_products(g.out.head(b, h), g.out.stride_n, dout, delta);
    attention_kernels().backward(
        head, {dout, lse, delta, dq, dk, dv, dbias.data, dbias.l, dbias.s, q_rows, dout_rows});
    store_queries(dq, static_cast<float>(call_.scale), g.dq.head(b, h), g.dq.stride_n);
    store_keys(dk, 0.693147181f, g.dk.head(b, h), g.dk.stride_n);
    store_keys(dv, head.head_scale, g.dv.head(b, h), g.dv.stride_n);
    if (g.dhead_scale) g.dhead_scale[b * call_.H + h] = dot(dv, head.v, head.S * width_);
  }

 private:
  static int64_t width_of(int64_t D) {
    int64_t width = 1;
    while (width < D && width < MAX_FUSED) width *= 2;
    return width < D ? padded(D) : width;
  }

  // transposed queries and the like; part 7 is where the keys begin
  float* part(int64_t n) { return memory_.data() + n * queries_; }

  float logit_scale() const { return static_cast<float>(call_.scale * 1.4426950408889634); }

  AttentionHead load_head(int64_t b, int64_t h) {
    if (b != image_) list_keys(call_, image_ = b, index_);
    const int64_t S = static_cast<int64_t>(index_.size());
    float *q = part(0), *k = part(7), *v = k + keys_;
    load_queries(call_.q.head(b, h), call_.q.stride_n, logit_scale(), q);
    load_keys(call_.k.head(b, h), call_.k.stride_n, k);
    load_keys(call_.v.head(b, h), call_.v.stride_n, v);
    AttentionHead head{call_.L, S, width_, padded_l_, q, k, v, index_.data()};
    head.unshifted = bound(q, k, S) <= MAX_UNSHIFTED;
    head.keep_factor = static_cast<float>(call_.keep_factor);
    head.head_scale = call_.head_scale ? call_.head_scale[h] : 1.0f;
    if (call_.seed) {
      head.keep = keep_.data();
      attention_kernels().keep_bits(dropout_of(call_, b, h), index_.data(), S, padded_l_,
                                    keep_.data());
    }
    if (call_.bias) {
      const int64_t* stride = call_.bias_stride;
      head.bias = call_.bias + b * stride[0] + h * stride[1];
      head.bias_l = stride[2], head.bias_s = stride[3];
    }
    return head;
  }

  // |q| |k|, the largest of each: no logit is further from zero
  float bound(const float* q, const float* k, int64_t S) {
    float* squares = part(6);
    std::fill(squares, squares + padded_l_, 0.0f);
    for (int64_t d = 0; d < width_; ++d) {
      for (int64_t i = 0; i < padded_l_; ++i) {
        squares[i] += q[d * padded_l_ + i] * q[d * padded_l_ + i];
      }
    }
    float most_q = 0, most_k = 0;
    for (int64_t i = 0; i < padded_l_; ++i) most_q = larger(most_q, squares[i]);
    for (int64_t j = 0; j < S; ++j) {
      most_k = larger(most_k, dot(k + j * width_, k + j * width_, width_));
    }
    return std::sqrt(most_q) * std::sqrt(most_k);
  }

  // a NaN wins, and then exceeds every bound
  static float larger(float a, float b) { return b <= a ? a : b; }

  static float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
  }

  void load_queries(const T* x, int64_t stride, float factor, float* to) const {
    std::fill(to, to + width_ * padded_l_, 0.0f);
    for (int64_t i = 0; i < call_.L; ++i) {
      for (int64_t d = 0; d < call_.D; ++d) to[d * padded_l_ + i] = to_acc(x[i * stride + d]) * factor;
    }
  }

  void load_rows(const T* x, int64_t stride, float factor, float* to) const {
    std::fill(to, to + width_ * padded_l_, 0.0f);
    for (int64_t i = 0; i < call_.L; ++i) {
      for (int64_t d = 0; d < call_.D; ++d) to[i * width_ + d] = to_acc(x[i * stride + d]) * factor;
    }
  }

  void load_keys(const T* x, int64_t stride, float* to) const {
    for (int64_t j : index_) {
      for (int64_t d = 0; d < call_.D; ++d) to[d] = to_acc(x[j * stride + d]);
      std::fill(to + call_.D, to + width_, 0.0f);
      to += width_;
    }
  }

  void store_queries(const float* from, float factor, T* x, int64_t stride) const {
    for (int64_t i = 0; i < call_.L; ++i) {
      for (int64_t d = 0; d < call_.D; ++d) assign(x[i * stride + d], from[d * padded_l_ + i] * factor);
    }
  }

  // masked keys get zeros
  void store_keys(const float* from, float factor, T* x, int64_t stride) const {
    auto next = index_.begin();
    for (int64_t j = 0; j < call_.S; ++j) {
      const bool attended = next != index_.end() && *next == j;
      for (int64_t d = 0; d < call_.D; ++d) {
        assign(x[j * stride + d], attended ? from[d] * factor : 0.0f);
      }
      if (attended) from += width_, ++next;
    }
  }

  // delta[i] += sum over channels of out * dout
  void add_products(const T* out, int64_t stride, const float* dout, float* delta) const {
    for (int64_t i = 0; i < call_.L; ++i) {
      for (int64_t d = 0; d < call_.D; ++d) {
        delta[i] += to_acc(out[i * stride + d]) * dout[d * padded_l_ + i];
      }
    }
  }

  const Call& call_;
  const int64_t width_, padded_l_, queries_, keys_;  // floats of a head's queries and keys
  Scratch memory_;
  std::vector<uint16_t> keep_;
  std::vector<int64_t> index_;
  int64_t image_ = -1;  // whose keys are in index_
};
