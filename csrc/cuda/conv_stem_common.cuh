// What the forward and backward kernels of the conv stem share.

#pragma once

#include "conv_stem.h"
#include "device.cuh"

namespace conv_stem {

constexpr int kWarps = 4;
constexpr int kTile = 16;  // sums side by side, 8 tokens

// the larger, or if one of them is not a number, the one with all bits set
__device__ __forceinline__ float larger(float a, float b) {
#ifdef __CUDACC__
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a != a || b != b ? dev::bits_float(0x7fffffffu) : a > b ? a : b;
#endif
}

// the bits of one number of an image, zero outside of it
template <class T>
__device__ __forceinline__ uint32_t pixel(const Image& x, const Sizes& s, int b, int c, int row,
                                          int column) {
  if (c >= s.CIN || row < 0 || row >= s.H || column < 0 || column >= s.W) return 0;
  return static_cast<const T*>(x.data)[b * x.image + c * x.channel + row * x.row +
                                       column * x.column].bits;
}

inline int tiles_of(const Sizes& s) { return (s.W + kTile - 1) / kTile; }

}  // namespace conv_stem
