// Convolution of a few input channels, ReLU and max pooling of one image, and its weight gradient,
// by the widest vectors that this processor has.

#pragma once

#include <cstdint>
#include <vector>

#include "bfloat16.h"

// windows: kernel, step and border along both sides
struct Windows {
  int64_t kernel, stride, padding;

  int64_t count(int64_t size) const { return (size + 2 * padding - kernel) / stride + 1; }
};

// sizes of one call; H and W are those of the image, HC and WC of the sums, HO and WO of the tokens
struct StemSizes {
  StemSizes(int64_t CIN, int64_t H, int64_t W, int64_t C, Windows conv, Windows pool)
      : CIN(CIN), H(H), W(W), C(C), conv(conv), pool(pool), HC(conv.count(H)), WC(conv.count(W)),
        HO(pool.count(HC)), WO(pool.count(WC)) {
    for (int64_t y = 0; y < conv.kernel; ++y) {
      for (int64_t i = 0; i < conv.kernel * CIN; ++i) offsets.push_back(y * pitch() + i);
    }
  }

  // numbers in a row of the image with its border, channels last
  int64_t pitch() const { return (W + 2 * conv.padding) * CIN; }
  // numbers that one sum adds
  int64_t depth() const { return conv.kernel * conv.kernel * CIN; }
  // the same and a column of ones for the bias, in whole vectors of any width
  int64_t padded_depth() const { return (depth() + 16) / 16 * 16; }

  int64_t CIN, H, W, C;
  Windows conv, pool;
  int64_t HC, WC, HO, WO;
  std::vector<int64_t> offsets;  // of the numbers of a patch from its first one
};

// kernels read up to this many numbers past the end of the image with its border
constexpr int64_t IMAGE_SLACK = 16;
// and take patches of up to three vectors of 16
constexpr int64_t MAX_PADDED_DEPTH = 48;

// T is the type of tokens, float or Bfloat16. `image` is (H + 2 padding, W + 2 padding, CIN) and
// slack. `first` is the first channel of the block of `block` channels that a call computes.
template <class T>
struct StemKernels {
  int64_t block;
  // weight: (depth, block), zero past C; bias: (C,) or null; rows: (pool kernel, WC, block);
  // out: (HO * WO, C); codes: the same or null
  void (*forward)(const StemSizes& sizes, const float* image, const float* weight,
                  const float* bias, int64_t first, float* rows, T* out, uint8_t* codes);
  // Adds the image's part to dw (C, padded depth), the bias's gradient in column `depth`.
  // patches: patch_floats(sizes) zeros at first, do: (HO * WO, C)
  void (*backward)(const StemSizes& sizes, const float* image, const T* out_grad,
                   const uint8_t* codes, int64_t first, float* patches, float* dw);
  // dy (HC * WC, C), zeros at first: each sum's gradient, from those of the tokens
  void (*scatter)(const StemSizes& sizes, const T* out_grad, const uint8_t* codes, int64_t first,
                  float* dy);
};

// positions in a row of patches: every place of every window, those past the border too
inline int64_t patch_columns(const StemSizes& s) {
  return (s.WO - 1) * s.pool.stride + s.pool.kernel;
}

// one row of patches, with slack for copies in whole vectors
inline int64_t patch_pitch(const StemSizes& s) {
  return patch_columns(s) * s.padded_depth() + IMAGE_SLACK;
}

inline int64_t patch_floats(const StemSizes& s) { return s.pool.kernel * patch_pitch(s); }

template <class T>
const StemKernels<T>& stem_kernels();
