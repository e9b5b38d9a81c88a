// Gradient of the conv stem's weight and bias.
//
// Each sum gathers its gradient from the windows that contain it and whose code names it, at most
// four of them; nothing is scattered. A product takes 16 channels as rows, 16 neighbouring sums as
// depth and 8 columns of the weight; the image stands in shared memory in planes, a second time
// shifted by one number, so that any two neighbours are one word. A block adds its images in
// registers and writes them once.
//
// Lane (g, t) = (lane / 4, lane % 4) owns channels 4 g .. 4 g + 3 of the warp's 32 and the sums
// 2t, 2t + 1, 2t + 8, 2t + 9 of a tile, which begin the windows of tokens t and t + 4.

#pragma once

#include "conv_stem_common.cuh"

namespace conv_stem {

constexpr int kGradientChannels = 32;
constexpr int kColumnGroups = kColumns / 8;

struct BackwardPlan {
  Backward call;
  int32_t strip;  // rows of tokens between two loads of the image
  int32_t pitch;  // words in one row of shared memory
};

inline uint32_t backward_shared_bytes(const BackwardPlan& p) {
  return uint32_t(2 * p.call.sizes.CIN * (2 * p.strip + 2)) * p.pitch * 4;
}

// four channels of one token
template <class T>
struct Token {
  uint2 grad;
  uint32_t codes;

  __device__ __forceinline__ void load(const Backward& call, int b, int row, int column,
                                       int channel) {
    const Sizes& s = call.sizes;
    grad = make_uint2(0, 0), codes = 0xffffffffu;
    if (row >= s.HO || column >= s.WO || channel >= s.C) return;
    const int64_t at = ((int64_t(b) * s.HO + row) * s.WO + column) * s.C + channel;
    grad = *reinterpret_cast<const uint2*>(static_cast<const T*>(call.out_grad) + at);
    codes = *reinterpret_cast<const uint32_t*>(call.codes + at);
  }

  // the gradient of channel c if it went to this place of the window
  __device__ __forceinline__ float at(int c, uint32_t place) const {
    const uint32_t word = c < 2 ? grad.x : grad.y;
    const float value = c % 2 == 0 ? dev::unpack_lo<T>(word) : dev::unpack_hi<T>(word);
    return (codes >> 8 * c & 0xff) == place ? value : 0.f;
  }
};

template <class T>
__device__ __forceinline__ void stage_planes(const BackwardPlan& p, int b, int top,
                                             const dev::Shared<uint32_t>& image) {
  const Backward& call = p.call;
  const int rows = 2 * p.strip + 2, plane = rows * p.pitch, copy = call.sizes.CIN * plane;
  for (int i = threadIdx.x; i < copy; i += blockDim.x) {
    const int c = i / plane, row = top + i % plane / p.pitch, column = i % p.pitch * 2 - 1;
    uint32_t n[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) n[j] = pixel<T>(call.x, call.sizes, b, c, row, column + j);
    image[i] = n[0] | n[1] << 16;
    image[copy + i] = n[1] | n[2] << 16;
  }
}

// grid: shares of the images, groups of channels
template <class T>
__global__ void __launch_bounds__(kWarps * 32, 3) conv_stem_dweight(BackwardPlan p) {
  const Sizes& s = p.call.sizes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = (blockIdx.y * (blockDim.x / 32) + warp) * kGradientChannels;
  const int channel = first + 4 * g;
  const int rows = 2 * p.strip + 2, plane = rows * p.pitch, copy = s.CIN * plane;
  const dev::Shared<uint32_t> image(0, 2 * copy);

  // column 8 i + g of the weight: where its numbers stand, or what stands for them
  uint32_t offset[kColumnGroups], keep[kColumnGroups], instead[kColumnGroups];
#pragma unroll
  for (int i = 0; i < kColumnGroups; ++i) {
    const int n = 8 * i + g, q = n % 9;
    const bool real = n < 9 * s.CIN;
    offset[i] = real ? n / 9 * plane + q / 3 * p.pitch + (q % 3 == 1 ? copy : q % 3 / 2) : 0;
    keep[i] = real ? 0xffffffffu : 0;
    instead[i] = n == 9 * s.CIN ? dev::from_float<T>(1.f).bits * 0x10001u : 0;
  }
  float sums[2][kColumnGroups][4] = {};

  for (int b = blockIdx.x; b < s.B; b += gridDim.x) {
    for (int begin = 0; begin < s.HO; begin += p.strip) {
      const int end = min(begin + p.strip, s.HO);
      dev::block_barrier();
      stage_planes<T>(p, b, 2 * begin - 1, image);
      dev::block_barrier();
      for (int x = 0; x < s.W; x += kTile) {
        Token<T> now[2][2], next[2][2];  // tokens t and t + 4, and the one to the right of each
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          now[j / 2][j % 2].load(p.call, b, begin, x / 2 + t + j / 2 * 4 + j % 2, channel);
        }
        for (int r = begin; r < end; ++r) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            next[j / 2][j % 2].load(p.call, b, r + 1, x / 2 + t + j / 2 * 4 + j % 2, channel);
          }
          uint32_t dy[2][2][4];  // rows of sums, products, registers
#pragma unroll
          for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const Token<T>&here = now[j][0], &right = now[j][1];
              const Token<T>&below = next[j][0], &across = next[j][1];
              const int at = 2 * j + c % 2;
              dy[0][c / 2][at] =
                  dev::pack<T>(here.at(c, 4), here.at(c, 5) + right.at(c, 3));
              dy[1][c / 2][at] = dev::pack<T>(
                  here.at(c, 7) + below.at(c, 1),
                  (here.at(c, 8) + right.at(c, 6)) + (below.at(c, 2) + across.at(c, 0)));
            }
          }
          const uint32_t corner = 2 * (r - begin) * p.pitch + x / 2 + t;
#pragma unroll
          for (int y = 0; y < 2; ++y) {
#pragma unroll
            for (int i = 0; i < kColumnGroups; ++i) {
              const uint32_t from = corner + y * p.pitch + offset[i];
              const uint32_t patch[2] = {(image[from] & keep[i]) | instead[i],
                                         (image[from + 4] & keep[i]) | instead[i]};
              dev::mma_16x8x16<T>(sums[0][i], dy[y][0], patch, sums[0][i]);
              dev::mma_16x8x16<T>(sums[1][i], dy[y][1], patch, sums[1][i]);
            }
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) now[j / 2][j % 2] = next[j / 2][j % 2];
        }
      }
    }
  }

  if (channel >= s.C) return;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = int64_t(blockIdx.x) * s.C + channel + 2 * m + j / 2;
#pragma unroll
      for (int i = 0; i < kColumnGroups; ++i) {
        p.call.sums[row * kColumns + 8 * i + 2 * t + j % 2] = sums[m][i][j];
      }
    }
  }
}

}  // namespace conv_stem
