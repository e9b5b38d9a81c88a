// One call of attention as the kernels see it: pointers, strides and options, already checked.

#pragma once

#include "attention_kernels.h"
#include "bfloat16.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

// a (B, H, N, D) tensor with dense channels
template <class T>
struct HeadsOf {
  T* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_n = 0;

  T* head(int64_t b, int64_t h) const { return data + b * stride_b + h * stride_h; }
};

// Acc: float, or double for double inputs; T may be narrower
template <class T, class Acc>
struct AttentionCall {
  int64_t B, H, L, S, D;
  HeadsOf<const T> q, k, v;
  const bool* key_mask;  // null or (B, S)
  const Acc* bias;       // null or (B, H, L, S) with the strides below
  int64_t bias_stride[4];
  const Acc* head_scale;  // null or (H,)
  const int64_t* seed;    // null or (1,)
  int64_t threshold;
  double keep_factor, scale;
};

template <class T, class Acc>
struct AttentionBackwardCall : AttentionCall<T, Acc> {
  HeadsOf<const T> dout, out;
  const Acc* lse;  // (B, H, L)
  HeadsOf<T> dq, dk, dv;
  Acc* dhead_scale;  // null or (B, H)
};

// where the bias gradient of one head is added to: null, or element (i, j) at i * l + j * s
template <class Acc>
struct BiasGradient {
  Acc* data = nullptr;
  int64_t l = 0, s = 0;
};

inline double to_acc(double x) { return x; }
template <class T>
float to_acc(T x) {
  return to_float(x);
}

inline void assign(double& to, double value) { to = value; }
template <class T>
void assign(T& to, float value) {
  to = from_float<T>(value);
}

// numbers of the keys that image b attends to, ascending
template <class T, class Acc>
void list_keys(const AttentionCall<T, Acc>& call, int64_t b, std::vector<int64_t>& index) {
  index.clear();
  for (int64_t j = 0; j < call.S; ++j) {
    if (call.key_mask == nullptr || call.key_mask[b * call.S + j]) index.push_back(j);
  }
}

template <class T, class Acc>
Dropout dropout_of(const AttentionCall<T, Acc>& call, int64_t b, int64_t h) {
  return {static_cast<uint64_t>(*call.seed), static_cast<uint32_t>(b * call.H + h),
          static_cast<uint32_t>(call.threshold)};
}

inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }
