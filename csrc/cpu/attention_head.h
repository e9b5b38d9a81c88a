// Heads in fp32: their tensors brought into the form that the kernels take, and the results back.

#pragma once

#include "attention_call.h"

#include <numeric>
#include <type_traits>

// Up to `group` neighbouring heads at once, because narrow heads share cache lines; kept by a thread
// from group to group.
template <class T>
class VectorHeads {
 public:
  using Call = AttentionCall<T, float>;
  using Backward = AttentionBackwardCall<T, float>;

  VectorHeads(const Call& call, int64_t group)
      : call_(call),
        width_(width_of(call.D)),
        padded_l_(padded(call.L)),
        queries_(width_ * padded_l_),
        keys_(padded(call.S * width_)),
        // an odd number of cache lines, so that the same place of all heads does not fall together
        size_((6 * queries_ + 4 * keys_ + 2 * padded_l_) / (2 * PAD) * (2 * PAD) + PAD),
        memory_(group * size_),
        keep_(call.seed ? call.S * padded_l_ / PAD : 0) {}

  // heads h to h + count - 1 of image b
  void forward(int64_t b, int64_t h, int64_t count, const HeadsOf<T>& out, float* lse) {
    load(b, h, count);
    for (int64_t n = 0; n < count; ++n) {
      const AttentionHead head = head_at(b, h, n);
      float* sums = part(n, LSE);
      attention_kernels().forward(head, part(n, OUT), sums);
      std::copy(sums, sums + call_.L, lse + (b * call_.H + h + n) * call_.L);
    }
    store_queries(OUT, 1.0f, out, b, h, count);
  }

  void backward(int64_t b, int64_t h, int64_t count, const Backward& g,
                const BiasGradient<float>& dbias) {
    load(b, h, count);
    load_queries(g.out, b, h, count, 1.0f, OUT);
    load_queries(g.dout, b, h, count, 1.0f, DOUT);
    if (width_ > MAX_FUSED) {
      load_rows(call_.q, b, h, count, logit_scale(), Q_ROWS);
      load_rows(g.dout, b, h, count, 1.0f, DOUT_ROWS);
    }
    for (int64_t n = 0; n < count; ++n) {
      const AttentionHead head = head_at(b, h, n);
      const int64_t at = b * call_.H + h + n;
      float *lse = part(n, LSE), *delta = lse + padded_l_, *dv = part(n, DV);
      std::copy(g.lse + at * call_.L, g.lse + (at + 1) * call_.L, lse);
      std::fill(lse + call_.L, lse + padded_l_, 0.0f);
      add_products(part(n, OUT), part(n, DOUT), delta);
      attention_kernels().backward(
          head, {part(n, DOUT), lse, delta, part(n, DQ), part(n, DK), dv, dbias.data, dbias.l,
                 dbias.s, part(n, Q_ROWS), part(n, DOUT_ROWS)});
      if (g.dhead_scale) {
        // one sum of many terms: in float it would lose what the terms keep
        g.dhead_scale[at] =
            static_cast<float>(std::inner_product(dv, dv + head.S * width_, head.v, 0.0));
      }
      for (int64_t c = 0; c < head.S * width_; ++c) dv[c] *= head.head_scale;
    }
    store_queries(DQ, static_cast<float>(call_.scale), g.dq, b, h, count);
    store_keys(DK, 0.693147181f, g.dk, b, h, count);
    store_keys(DV, 1.0f, g.dv, b, h, count);
  }

 protected:  // WeightHeads loads and stores as this does
  static int64_t width_of(int64_t D) {
    int64_t width = 1;
    while (width < D && width < MAX_FUSED) width *= 2;
    return width < D ? padded(D) : width;
  }

  // of queries: transposed up to DQ; of keys; then of single numbers per query
  enum Part { Q, OUT, DOUT, DQ, Q_ROWS, DOUT_ROWS, K, V, DK, DV, LSE };

  float* part(int64_t n, Part which) {
    float* head = memory_.data() + n * size_;
    return which < K ? head + which * queries_ : head + 6 * queries_ + (which - K) * keys_;
  }

  float logit_scale() const { return static_cast<float>(call_.scale * 1.4426950408889634); }

  void load(int64_t b, int64_t h, int64_t count) {
    if (b != image_) list_keys(call_, image_ = b, index_);
    load_queries(call_.q, b, h, count, logit_scale(), Q);
    load_keys(call_.k, b, h, count, K);
    load_keys(call_.v, b, h, count, V);
  }

  // head h + n, loaded in place n
  AttentionHead head_at(int64_t b, int64_t h, int64_t n) {
    const int64_t S = static_cast<int64_t>(index_.size());
    AttentionHead head{call_.L, S, width_, padded_l_, part(n, Q), part(n, K), part(n, V)};
    head.index = index_.data();
    head.keep_factor = static_cast<float>(call_.keep_factor);
    head.head_scale = call_.head_scale ? call_.head_scale[h + n] : 1.0f;
    if (call_.seed) {
      head.keep = keep_.data();
      attention_kernels().keep_bits(dropout_of(call_, b, h + n), index_.data(), S, padded_l_,
                                    keep_.data());
    }
    if (call_.bias) {
      const int64_t* stride = call_.bias_stride;
      head.bias = call_.bias + b * stride[0] + (h + n) * stride[1];
      head.bias_l = stride[2], head.bias_s = stride[3];
    }
    head.all_keys = call_.S;
    head.unshifted = attention_kernels().largest_logit(head) <= MAX_UNSHIFTED;
    return head;
  }

  void load_queries(const HeadsOf<const T>& x, int64_t b, int64_t h, int64_t count, float factor,
                    Part which) {
    float* first = part(0, which);
    if (width_ > call_.D || padded_l_ > call_.L) {
      for (int64_t n = 0; n < count; ++n) {
        std::fill(first + n * size_, first + n * size_ + queries_, 0.0f);
      }
    }
    for_blocks(x, count, [=, this](int64_t c, int64_t i) {
      float* to[PAD];
      for (int64_t r = 0; r < PAD; ++r) to[r] = row_of(which, c + r) + i;
      const auto* from = reinterpret_cast<const float*>(x.head(b, h) + i * x.stride_n + c);
      attention_kernels().gather_block(from, x.stride_n, to, factor);
    }, [=, this](int64_t c, int64_t i, int64_t end) {
      const T* from = x.head(b, h + c / call_.D) + c % call_.D;
      float* to = row_of(which, c);
      for (; i < end; ++i) to[i] = to_acc(from[i * x.stride_n]) * factor;
    });
  }

  void store_queries(Part which, float factor, const HeadsOf<T>& x, int64_t b, int64_t h,
                     int64_t count) {
    for_blocks(x, count, [=, this](int64_t c, int64_t i) {
      const float* from[PAD];
      for (int64_t r = 0; r < PAD; ++r) from[r] = row_of(which, c + r) + i;
      auto* to = reinterpret_cast<float*>(x.head(b, h) + i * x.stride_n + c);
      attention_kernels().scatter_block(from, to, x.stride_n, factor);
    }, [=, this](int64_t c, int64_t i, int64_t end) {
      const float* from = row_of(which, c);
      T* to = x.head(b, h + c / call_.D) + c % call_.D;
      for (; i < end; ++i) assign(to[i * x.stride_n], from[i] * factor);
    });
  }

  // transposed queries of channel c, counted over all heads
  float* row_of(Part which, int64_t c) {
    return part(c / call_.D, which) + c % call_.D * padded_l_;
  }

  // Calls block(c, i) for PAD channels and PAD queries where those channels lie side by side as
  // floats, and single(c, i, end) for what remains; channels are counted over all heads. In this
  // order a cache line of the caller's tensor is used up while it is there.
  template <class X, class Block, class Single>
  void for_blocks(const HeadsOf<X>& x, int64_t count, const Block& block,
                  const Single& single) const {
    const int64_t channels = count * call_.D;
    const bool dense = std::is_same_v<T, float> && (count == 1 || x.stride_h == call_.D);
    for (int64_t i = 0; i < call_.L; i += PAD) {
      const int64_t end = std::min(call_.L, i + PAD);
      int64_t c = 0;
      for (; dense && end == i + PAD && c + PAD <= channels; c += PAD) block(c, i);
      for (; c < channels; ++c) single(c, i, end);
    }
  }

  void load_rows(const HeadsOf<const T>& x, int64_t b, int64_t h, int64_t count, float factor,
                 Part which) {
    for (int64_t n = 0; n < count; ++n) {
      float* to = part(n, which);
      std::fill(to, to + queries_, 0.0f);
      for (int64_t i = 0; i < call_.L; ++i) {
        const T* from = x.head(b, h + n) + i * x.stride_n;
        for (int64_t d = 0; d < call_.D; ++d) to[i * width_ + d] = to_acc(from[d]) * factor;
      }
    }
  }

  void load_keys(const HeadsOf<const T>& x, int64_t b, int64_t h, int64_t count, Part which) {
    const int64_t S = static_cast<int64_t>(index_.size()), used = S * width_;
    for (int64_t j = 0; j < S; j += PAD) {
      const int64_t end = std::min(S, j + PAD);
      for (int64_t n = 0; n < count; ++n) {
        const T* from = x.head(b, h + n);
        float* to = part(n, which);
        switch (call_.D) {  // the loop over so few channels would cost more than the copy
          case 1: copy_rows<1>(from, x.stride_n, j, end, to); break;
          case 2: copy_rows<2>(from, x.stride_n, j, end, to); break;
          case 4: copy_rows<4>(from, x.stride_n, j, end, to); break;
          case 8: copy_rows<8>(from, x.stride_n, j, end, to); break;
          default: copy_rows<0>(from, x.stride_n, j, end, to);
        }
      }
    }
    for (int64_t n = 0; n < count; ++n) {
      std::fill(part(n, which) + used, part(n, which) + padded(used), 0.0f);
    }
  }

  // rows j to end of the list; WIDTH: the channels, or 0 where they are counted at run time
  template <int64_t WIDTH>
  void copy_rows(const T* x, int64_t stride, int64_t j, int64_t end, float* to) const {
    const int64_t D = WIDTH ? WIDTH : call_.D, width = WIDTH ? WIDTH : width_;
    for (; j < end; ++j) {
      const T* from = x + index_[j] * stride;
      float* row = to + j * width;
      if constexpr (WIDTH > 0) {  // all are read before one is written, so it is one move
        float values[WIDTH];
        for (int64_t d = 0; d < WIDTH; ++d) values[d] = to_acc(from[d]);
        std::memcpy(row, values, sizeof values);
      } else {
        for (int64_t d = 0; d < D; ++d) row[d] = to_acc(from[d]);
      }
      if (WIDTH == 0) std::fill(row + D, row + width, 0.0f);
    }
  }

  // masked keys get zeros
  void store_keys(Part which, float factor, const HeadsOf<T>& x, int64_t b, int64_t h,
                  int64_t count) {
    place_.assign(call_.S, -1);
    for (size_t row = 0; row < index_.size(); ++row) place_[index_[row]] = row;
    for (int64_t j = 0; j < call_.S; j += PAD) {
      const int64_t end = std::min(call_.S, j + PAD);
      for (int64_t n = 0; n < count; ++n) {
        T* to = x.head(b, h + n);
        const float* from = part(n, which);
        switch (call_.D) {
          case 1: spread_rows<1>(from, factor, j, end, to, x.stride_n); break;
          case 2: spread_rows<2>(from, factor, j, end, to, x.stride_n); break;
          case 4: spread_rows<4>(from, factor, j, end, to, x.stride_n); break;
          case 8: spread_rows<8>(from, factor, j, end, to, x.stride_n); break;
          default: spread_rows<0>(from, factor, j, end, to, x.stride_n);
        }
      }
    }
  }

  template <int64_t WIDTH>
  void spread_rows(const float* from, float factor, int64_t j, int64_t end, T* x,
                   int64_t stride) const {
    const int64_t D = WIDTH ? WIDTH : call_.D, width = WIDTH ? WIDTH : width_;
    for (; j < end; ++j) {
      const float* row = from + place_[j] * width;
      T* to = x + j * stride;
      for (int64_t d = 0; d < D; ++d) assign(to[d], place_[j] < 0 ? 0.0f : row[d] * factor);
    }
  }

  // delta[i] = sum over channels of out * dout
  void add_products(const float* out, const float* dout, float* delta) const {
    std::fill(delta, delta + padded_l_, 0.0f);
    for (int64_t d = 0; d < width_; ++d) {
      for (int64_t i = 0; i < padded_l_; ++i) {
        delta[i] += out[d * padded_l_ + i] * dout[d * padded_l_ + i];
      }
    }
  }

  const Call& call_;
  const int64_t width_, padded_l_, queries_, keys_, size_;  // the last three: floats of one head
  Scratch memory_;
  std::vector<uint16_t> keep_;
  std::vector<int64_t> index_;
  std::vector<int64_t> place_;  // of each of the caller's keys in the list, or -1
  int64_t image_ = -1;          // whose keys are in index_
};
