// What the host code and the kernels of the conv stem share: the arguments of a call, checked.
// The convolution is 3 x 3 with stride 1 and a border of 1, the pooling 3 x 3 with stride 2 and
// a border of 1; there are at most kMaxImageChannels input channels and a multiple of 8 channels.

#pragma once

#include <cstdint>

namespace conv_stem {

constexpr int kMaxImageChannels = 3;
constexpr int kMaxWidth = 960;
// columns of the gradient's sums: 9 per image channel, one of the bias, the rest unused
constexpr int kColumns = 32;

enum class Type { Bf16, Fp16 };

struct Image {
  const void* data;
  int64_t image, channel, row, column;  // strides in elements
};

struct Sizes {
  Type type;
  int32_t B, CIN, H, W, C;
  int32_t HO, WO;  // of the tokens
};

struct Forward {
  Sizes sizes;
  Image x;
  const void* weight;  // (C, CIN, 3, 3) dense
  const void* bias;    // (C,) dense or null
  void* out;           // (B, HO * WO, C) dense
  uint8_t* codes;      // like out, or null
};

struct Backward {
  Sizes sizes;
  Image x;
  const void* out_grad;  // (B, HO * WO, C) dense
  const uint8_t* codes;
  float* sums;   // (shares, C, kColumns) dense
  int32_t shares;  // of the images: share s takes images s, s + shares, ...
};

// `stream` is a cudaStream_t of the current device; the result is a cudaError_t
int launch_forward(const Forward& call, void* stream);
int launch_backward(const Backward& call, void* stream);

}  // namespace conv_stem
