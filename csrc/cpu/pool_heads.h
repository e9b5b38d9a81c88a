// Pooling of neighbouring heads of one image and its gradient, by the widest vectors that this
// processor has.

#pragma once

#include <cstdint>

#include "bfloat16.h"

// what the gradient of one image needs beside the tokens, and where it goes
template <class T>
struct PoolGradient {
  const float* out_grad;  // (H, D)
  const float* pooled;    // (H, D)
  const float* lse;       // (H,)
  T* dx;                  // N tokens, stride_n apart, of (H, D)
  int64_t stride_n;
  float* dw;  // (H, D), of this image
};

// x: H heads of D channels side by side, tokens stride_n apart; w and out: (H, D); lse: (H,)
template <class T>
struct PoolKernels {
  void (*forward)(const T* x, int64_t stride_n, int64_t N, int64_t H, int64_t D, const float* w,
                  float* out, float* lse);
  void (*backward)(const T* x, int64_t stride_n, int64_t N, int64_t H, int64_t D, const float* w,
                   const PoolGradient<T>& grad);
};

// T is float or Bfloat16
template <class T>
const PoolKernels<T>& pool_kernels();
