// Heads whose weights are averaged: loaded as for attention, their weights added up in one place.

#pragma once

#include "attention_head.h"

template <class T>
class WeightHeads : public VectorHeads<T> {
  using Base = VectorHeads<T>;
  using typename Base::Call;
  using Base::call_, Base::index_, Base::padded_l_, Base::part, Base::width_;

 public:
  WeightHeads(const Call& call, int64_t group)
      : Base(call, group), group_(group), sum_(call.S * padded_l_) {}

  // All heads of image b. out: null data for none; lse: of query i and head h at
  // h * lse_stride + i; weights: (L, S), contiguous, each times factor
  void forward(int64_t b, const HeadsOf<T>& out, float* lse, int64_t lse_stride, T* weights,
               float factor) {
    std::fill(sum_.data(), sum_.data() + call_.S * padded_l_, 0.0f);
    for (int64_t h = 0; h < call_.H; h += group_) {
      const int64_t count = std::min(group_, call_.H - h);
      Base::load(b, h, count);
      for (int64_t n = 0; n < count; ++n) {
        float* sums = part(n, Base::LSE);
        attention_kernels().add_weights(Base::head_at(b, h, n),
                                        out.data ? part(n, Base::OUT) : nullptr, sums,
                                        sum_.data());
        std::copy(sums, sums + call_.L, lse + (h + n) * lse_stride);
      }
      if (out.data) Base::store_queries(Base::OUT, 1.0f, out, b, h, count);
    }
    store_sum(weights, factor);
  }

  // dweights: (L, S) of image b, contiguous, to be multiplied by factor
  void backward(int64_t b, int64_t h, int64_t count, const T* dweights, float factor,
                const HeadsOf<T>& dq, const HeadsOf<T>& dk, const BiasGradient<float>& dbias) {
    Base::load(b, h, count);
    if (width_ > MAX_FUSED) {
      Base::load_rows(call_.q, b, h, count, Base::logit_scale(), Base::Q_ROWS);
    }
    if (dweights != loaded_) load_sum(loaded_ = dweights, factor);
    for (int64_t n = 0; n < count; ++n) {
      AttentionGradient g{sum_.data()};
      g.dq = part(n, Base::DQ), g.dk = part(n, Base::DK), g.q_rows = part(n, Base::Q_ROWS);
      g.dbias = dbias.data, g.dbias_l = dbias.l, g.dbias_s = dbias.s;
      attention_kernels().weights_backward(Base::head_at(b, h, n), g);
    }
    Base::store_queries(Base::DQ, static_cast<float>(call_.scale), dq, b, h, count);
    Base::store_keys(Base::DK, 0.693147181f, dk, b, h, count);
  }

 private:
  // Calls block(i, j) for PAD queries and PAD keys that are all there, single(i, row) for the rest;
  // `row` counts the keys that are not masked, and a block has every key
  template <class Block, class Single>
  void for_weights(const Block& block, const Single& single) const {
    const int64_t S = static_cast<int64_t>(index_.size());
    const bool dense = std::is_same_v<T, float> && S == call_.S;
    for (int64_t i = 0; i < call_.L; i += PAD) {
      const int64_t end = std::min(call_.L, i + PAD);
      int64_t row = 0;
      for (; dense && end == i + PAD && row + PAD <= S; row += PAD) block(i, row);
      for (int64_t at = i; at < end; ++at) {
        for (int64_t j = row; j < S; ++j) single(at, j);
      }
    }
  }

  void store_sum(T* weights, float factor) {
    if (index_.size() < static_cast<size_t>(call_.S)) {
      std::fill(weights, weights + call_.L * call_.S, T{});
    }
    for_weights([&](int64_t i, int64_t j) {
      const float* from[PAD];
      for (int64_t r = 0; r < PAD; ++r) from[r] = sum_row(j + r) + i;
      auto* to = reinterpret_cast<float*>(weights + i * call_.S + j);
      attention_kernels().scatter_block(from, to, call_.S, factor);
    }, [&](int64_t i, int64_t row) {
      assign(weights[i * call_.S + index_[row]], sum_row(row)[i] * factor);
    });
  }

  void load_sum(const T* weights, float factor) {
    std::fill(sum_.data(), sum_.data() + call_.S * padded_l_, 0.0f);
    for_weights([&](int64_t i, int64_t j) {
      float* to[PAD];
      for (int64_t r = 0; r < PAD; ++r) to[r] = sum_row(j + r) + i;
      const auto* from = reinterpret_cast<const float*>(weights + i * call_.S + j);
      attention_kernels().gather_block(from, call_.S, to, factor);
    }, [&](int64_t i, int64_t row) {
      sum_row(row)[i] = to_acc(weights[i * call_.S + index_[row]]) * factor;
    });
  }

  float* sum_row(int64_t row) { return sum_.data() + row * padded_l_; }

  const int64_t group_;
  Scratch sum_;                // (keys that are not masked, padded_l): of all heads
  const T* loaded_ = nullptr;  // whose gradient is there
};
