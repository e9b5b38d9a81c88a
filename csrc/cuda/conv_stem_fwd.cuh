// Forward kernel of the conv stem.
//
// An image stands in shared memory, four numbers a pixel. A matrix product takes 16 neighbouring
// sums as rows (even places 0..7, odd ones 8..15), 9 pixels and a one as 40 columns, and 8 channels.
// A warp keeps the weights of 64 channels and walks down one tile of columns after the other: the
// last row of sums waits in registers for the next window, the last column of a tile in shared
// memory for the next tile, and no sum is computed twice.
//
// The last four bits of a sum give way to a tag, 4 (2 - row) + 2 - column of its place in the
// window, so that one maximum finds value and place. Positive sums that agree to 20 bits count as equal, and the first of them wins.
// A NaN wins over every number and passes no gradient on; an infinite sum becomes one.
//
// Lane (g, t) = (lane / 4, lane % 4) owns token g of the tile and channels 16 t .. 16 t + 15.

#pragma once

#include "conv_stem_common.cuh"

namespace conv_stem {

constexpr int kGroups = 8;   // of 8 channels in one product
constexpr int kChannels = 8 * kGroups;
constexpr int kChunks = 5;   // of 8 columns in one product: 2 pixels each
// a sum outside of the plane: finite and with free bits
constexpr uint32_t kLowest = 0xff7ffff0u;

struct ForwardPlan {
  Forward call;
  int32_t strip;  // rows of tokens in one block
  int32_t pitch;  // pixels in one row of shared memory
};

inline uint32_t forward_image_bytes(const ForwardPlan& p) {
  return uint32_t(2 * p.strip + 3) * p.pitch * 8;
}

inline uint32_t forward_shared_bytes(const ForwardPlan& p) {
  return forward_image_bytes(p) + kWarps * p.strip * kChannels * 4;
}

__device__ __forceinline__ float tagged(float sum, uint32_t tag) {
  return dev::bits_float((dev::float_bits(sum) & ~15u) | tag);
}

// for bits that are free; what is not a number stays so
__device__ __forceinline__ float add_tag(float sum, uint32_t tag) {
  return dev::bits_float(dev::float_bits(sum) | tag);
}

template <class T, bool kCodes>
struct ForwardWarp {
  uint32_t weight[kGroups][kChunks];
  uint32_t offset[kChunks];  // words from the first pixel of a patch to this lane's part of it
  uint32_t tail;             // this lane's part of the last chunk where no pixel is
  int lane, g, t;

  __device__ __forceinline__ void load_weights(const Forward& call, int first) {
    const Sizes& s = call.sizes;
    const T* all = static_cast<const T*>(call.weight);
    const T* bias = static_cast<const T*>(call.bias);
    const int place = 16 * (g / 2) + g % 2, low = t % 2 * 2;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int channel = first + place + 2 * i;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const int q = 2 * k + t / 2;
        uint32_t bits[2] = {0, 0};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (channel < s.C && q < 9 && low + e < s.CIN) {
            bits[e] = all[(channel * s.CIN + low + e) * 9 + q].bits;
          }
        }
        if (channel < s.C && q == 9 && low == 0 && bias != nullptr) bits[0] = bias[channel].bits;
        weight[i][k] = bits[0] | bits[1] << 16;
      }
    }
  }

  __device__ __forceinline__ void set_offsets(int pitch) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int q = 2 * k + t / 2;
      offset[k] = q < 9 ? (q / 3 * pitch + q % 3) * 2 + t % 2 : 0;
    }
    tail = t == 2 ? dev::from_float<T>(1.f).bits : 0;
  }

  // rows of the products: patches of the tile's sums, the first of which starts at this word
  __device__ __forceinline__ void load_patches(const dev::Shared<uint32_t>& image, uint32_t corner,
                                               uint32_t (&a)[kChunks][2]) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      a[k][0] = image[corner + 4 * g + offset[k]];
      a[k][1] = image[corner + 4 * g + offset[k] + 2];
    }
    if (t >= 2) a[kChunks - 1][0] = a[kChunks - 1][1] = tail;
  }

  // (even place, channels 2i, 2i + 1 of 16 t ..), (odd place, the same)
  __device__ __forceinline__ void sums_of(const uint32_t (&a)[kChunks][2], int i,
                                          float (&d)[4]) const {
    const float zero[4] = {0.f, 0.f, 0.f, 0.f};
    dev::mma_16x8x8<T>(d, a[4], weight[i][4], zero);
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const uint32_t rows[4] = {a[k][0], a[k][1], a[k + 1][0], a[k + 1][1]};
      const uint32_t columns[2] = {weight[i][k], weight[i][k + 1]};
      dev::mma_16x8x16<T>(d, rows, columns, d);
    }
  }

  // before the first tile of every row stands no sum
  __device__ __forceinline__ void clear_left(const dev::Shared<uint32_t>& left_sums, uint32_t at,
                                             int rows) const {
    if (g > 0) return;
    for (int i = 0; i < rows * kGroups; ++i) {
      dev::store_shared(left_sums, at + i * 8 + 2 * t, make_uint2(kLowest, kLowest));
    }
  }

  // Eight tokens of one row. `above`: the row of sums over the window, then its last one; `even`,
  // `odd`: patches of the other two, of which the odd one may be missing, as are the columns of
  // the tile from `width` on.
  __device__ __forceinline__ void pool(const uint32_t (&even)[kChunks][2],
                                       const uint32_t (&odd)[kChunks][2],
                                       float (&above)[kGroups][4], bool last_row, int width,
                                       const dev::Shared<uint32_t>& left_sums,
                                       uint32_t left_at, uint32_t (&out)[kGroups],
                                       uint32_t (&codes)[kGroups / 2]) const {
    const float lowest = dev::bits_float(kLowest);
    const uint32_t keep_odd = last_row ? 0 : ~15u, no_odd = last_row ? kLowest : 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float e[4], o[4], v[4];
      sums_of(even, i, e);
      sums_of(odd, i, o);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float bottom = dev::bits_float((dev::float_bits(o[j]) & keep_odd) | no_odd);
        v[j] = larger(larger(above[i][j], tagged(e[j], 4)), bottom);
        above[i][j] = add_tag(bottom, 8);
      }
      if (width < kTile) {
        if (2 * g >= width) v[0] = v[1] = lowest;
        if (2 * g + 1 >= width) v[2] = v[3] = lowest;
      }
      // the odd place of the token before; that of the tile before waits in shared memory
      float left[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) left[c] = dev::shfl(add_tag(v[2 + c], 2), (lane + 28) % 32);
      if (g == 0) {
        const uint32_t at = left_at + i * 8 + 2 * t;
        const uint2 before = dev::load_shared<uint2>(left_sums, at);
        dev::store_shared(left_sums, at,
                          make_uint2(dev::float_bits(left[0]), dev::float_bits(left[1])));
        left[0] = dev::bits_float(before.x), left[1] = dev::bits_float(before.y);
      }
      float best[2];
      uint32_t code[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float most = larger(larger(left[c], add_tag(v[c], 1)), v[2 + c]);
        best[c] = larger(most, 0.f);
        if constexpr (kCodes) {
          // a sum of zero has a tag, too, and is then subnormal
          const uint32_t tag = dev::float_bits(most) & 15;
          code[c] = most >= 0x1p-126f ? 8 - tag + tag / 4 : 9;
        }
      }
      out[i] = dev::pack<T>(best[0], best[1]);
      if constexpr (kCodes) {
        const uint32_t two = code[0] | code[1] << 8;
        codes[i / 2] = i % 2 == 0 ? two : codes[i / 2] | two << 16;
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void stage_pixels(const ForwardPlan& p, int b, int top,
                                             const dev::Shared<uint32_t>& image) {
  const Forward& call = p.call;
  const int count = (2 * p.strip + 3) * p.pitch;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int row = top + i / p.pitch, column = i % p.pitch - 1;
    uint32_t c[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < kMaxImageChannels; ++j) {
      c[j] = pixel<T>(call.x, call.sizes, b, j, row, column);
    }
    image[2 * i] = c[0] | c[1] << 16;
    image[2 * i + 1] = c[2] | c[3] << 16;
  }
}

// grid: images (a block takes several where they are more than blocks), strips, channels
template <class T, bool kCodes>
__global__ void __launch_bounds__(kWarps * 32, 3) conv_stem_forward(ForwardPlan p) {
  const Sizes& s = p.call.sizes;
  const int warp = threadIdx.x / 32;
  ForwardWarp<T, kCodes> w;
  w.lane = threadIdx.x % 32, w.g = w.lane / 4, w.t = w.lane % 4;
  const int first = (blockIdx.z * (blockDim.x / 32) + warp) * kChannels;
  const int channel = first + 16 * w.t;
  w.load_weights(p.call, first);
  w.set_offsets(p.pitch);

  const uint32_t image_bytes = uint32_t(2 * p.strip + 3) * p.pitch * 8;
  const dev::Shared<uint32_t> image(0, image_bytes / 4);
  const dev::Shared<uint32_t> left_sums(image_bytes, kWarps * p.strip * kChannels);
  const int begin = blockIdx.y * p.strip, end = min(begin + p.strip, s.HO);
  const int top = 2 * begin - 2;  // row of the image that stands first in shared memory
  for (int b = blockIdx.x; b < s.B; b += gridDim.x) {
    dev::block_barrier();
    stage_pixels<T>(p, b, top, image);
    dev::block_barrier();
    w.clear_left(left_sums, warp * p.strip * kChannels, end - begin);
    for (int x = 0; x < s.W; x += kTile) {
      float above[kGroups][4];
      uint32_t a[2][kChunks][2];
      if (begin > 0) w.load_patches(image, 2 * x, a[0]);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (begin > 0) w.sums_of(a[0], i, above[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          above[i][j] = begin > 0 ? tagged(above[i][j], 8) : dev::bits_float(kLowest);
        }
      }
      for (int r = begin; r < end; ++r) {
        const uint32_t corner = ((2 * (r - begin) + 1) * p.pitch + x) * 2;
        w.load_patches(image, corner, a[0]);
        w.load_patches(image, corner + 2 * p.pitch, a[1]);
        uint32_t out[kGroups], codes[kGroups / 2];
        const uint32_t left_at = (warp * p.strip + r - begin) * kChannels;
        w.pool(a[0], a[1], above, 2 * r + 1 >= s.H, s.W - x, left_sums, left_at, out, codes);
        const int column = x / 2 + w.g;
        if (column >= s.WO) continue;
        const int64_t token = ((int64_t(b) * s.HO + r) * s.WO + column) * s.C + channel;
        T* to = static_cast<T*>(p.call.out) + token;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (channel + 8 * half >= s.C) continue;
          const int i = 4 * half;
          *reinterpret_cast<uint4*>(to + 8 * half) =
              make_uint4(out[i], out[i + 1], out[i + 2], out[i + 3]);
          if constexpr (kCodes) {
            *reinterpret_cast<uint2*>(p.call.codes + token + 8 * half) =
                make_uint2(codes[i / 2], codes[i / 2 + 1]);
          }
        }
      }
    }
  }
}

}  // namespace conv_stem
