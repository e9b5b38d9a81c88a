// Arguments of attention's backward kernels and the pieces that they are put together from.

#pragma once

#include <cmath>

#include "device.cuh"

namespace attention_bwd {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr float LOG2E = 1.44269504f;

// (B, H, N, D) with the last dimension dense; strides in elements
template <class T>
struct Matrix {
  T* data;
  int64_t stride_b, stride_h;
  int stride_n;

  __device__ __forceinline__ T* row(int64_t b, int h, int n) const {
    return data + b * stride_b + h * stride_h + int64_t(n) * stride_n;
  }
};

template <class T>
struct Arguments {
  Matrix<const T> q, k, v, o, d_o;
  Matrix<T> dq, dk, dv;
  const float* lse;            // (B, H, L), natural logarithm; -inf where a query has no keys
  const uint8_t* key_mask;     // (B, S), 0 where a key takes no part; or null
  int64_t mask_b, mask_s;      // its strides
  const float* head_scale;     // (H,) or null
  const int64_t* seed;         // of dropout
  float* dhead_scale;          // (B, H, warps_per_head): parts of the gradient; or null
  float* sums;                 // sums_bytes(), where one round does not hold all queries
  int B, H, L, S, D;
  int access;                  // elements of one access to global memory: 1, 2, 4 or 8
  int warps_per_head, strip;   // 1, 2 or 4; queries of a warp, a multiple of 16
  float scale, scale_log2;     // of the logits; times log2(e)
  float keep_factor;           // of weights that dropout keeps; 1 without dropout
  // a weight stays where its 16 random bits are at least a threshold:
  uint32_t offset;  // 0x8000 - threshold % 0x8000, in both halves
  uint32_t either;  // all ones for a threshold below 0x8000, else 0
};

// ---- numbers ----

// 2^x; emulated on the FMA pipe it is good to 8e-5 and ends at 2^-126
__device__ __forceinline__ float exp2(float x, bool emulated) {
  if (!emulated) return dev::exp2(x);
  x = fmaxf(x, -126.0f);
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the rounded integer is in the low bits
  const float r = x - (shifted - 12582912.0f);
  float p = dev::fma(r, 0.0551716685f, 0.240153614f);
  p = dev::fma(p, r, 0.693153060f);
  p = dev::fma(p, r, 1.0f);
  return dev::bits_float((dev::float_bits(shifted) << 23) + dev::float_bits(p));
}

// products of the two halves
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t r;
  if constexpr (std::is_same_v<T, dev::Bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
#else
  return dev::pack<T>(dev::unpack_lo<T>(a) * dev::unpack_lo<T>(b),
                      dev::unpack_hi<T>(a) * dev::unpack_hi<T>(b));
#endif
}

// bit 15 (HIGH: 31) of a and of b, each spread over a half
template <bool HIGH>
__device__ __forceinline__ uint32_t spread_bits(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "n"(HIGH ? 0xffbb : 0xdd99));
  return r;
#else
  constexpr int bit = HIGH ? 31 : 15;
  return (a >> bit & 1) * 0xffffu | (b >> bit & 1) * 0xffff0000u;
#endif
}

// x, of which the compiler knows nothing: it neither splits sums nor makes x again from its parts
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// two right operands, from ldmatrix addresses of Strip::halves
__device__ __forceinline__ void load_halves(uint32_t (&b)[2][2], const unsigned char* row) {
  uint32_t x[4];
  dev::ldmatrix_x4(x, row);
  b[0][0] = x[0], b[0][1] = x[1], b[1][0] = x[2], b[1][1] = x[3];
}

// ---- global memory ----

template <int ELEMENTS>
struct Words;
template <>
struct Words<2> {
  using Type = uint32_t;
};
template <>
struct Words<4> {
  using Type = uint2;
};
template <>
struct Words<8> {
  using Type = uint4;
};

// D channels in pairs, zeros behind them and where not valid
template <class T, int WIDTH>
__device__ __forceinline__ void load_row(const T* row, const Arguments<T>& a, bool valid,
                                         uint32_t (&x)[WIDTH / 2]) {
  constexpr int WIDEST = WIDTH == 4 ? 4 : 8;
#pragma unroll
  for (int p = 0; p < WIDTH / 2; ++p) x[p] = 0;
  if (!valid) return;
  if (a.access >= WIDEST) {
    using Word = typename Words<WIDEST>::Type;
#pragma unroll
    for (int c = 0; c < WIDTH; c += WIDEST) {
      if (c < a.D) {
        const Word word = *reinterpret_cast<const Word*>(row + c);
        x[c / 2] = word.x, x[c / 2 + 1] = word.y;
        if constexpr (WIDEST == 8) x[c / 2 + 2] = word.z, x[c / 2 + 3] = word.w;
      }
    }
  } else if (a.access >= 2) {
#pragma unroll
    for (int c = 0; c < WIDTH; c += 2)
      if (c < a.D) x[c / 2] = *reinterpret_cast<const uint32_t*>(row + c);
  } else {
#pragma unroll
    for (int c = 0; c < WIDTH; ++c)
      if (c < a.D) x[c / 2] |= uint32_t(row[c].bits) << (c % 2 * 16);
  }
}

// channels c and c + 1 of a row
template <class T>
__device__ __forceinline__ uint32_t load_pair(const T* row, int c, const Arguments<T>& a,
                                              bool valid) {
  if (!valid || c >= a.D) return 0;
  if (a.access >= 2) return *reinterpret_cast<const uint32_t*>(row + c);
  return row[c].bits | (c + 1 < a.D ? uint32_t(row[c + 1].bits) << 16 : 0);
}

template <class T>
__device__ __forceinline__ void store_pair(T* row, int c, const Arguments<T>& a, bool valid,
                                           float lo, float hi) {
  if (!valid || c >= a.D) return;
  const uint32_t pair = dev::pack<T>(lo, hi);
  if (a.access >= 2) {
    *reinterpret_cast<uint32_t*>(row + c) = pair;
  } else {
    row[c].bits = uint16_t(pair);
    if (c + 1 < a.D) row[c + 1].bits = uint16_t(pair >> 16);
  }
}

// ---- shared memory ----

// 8 elements of one row of a panel
__device__ __forceinline__ void store_panel(uint32_t panel, int row, uint32_t x, uint32_t y,
                                            uint32_t z, uint32_t w) {
  const dev::Shared<uint32_t> memory(panel + 16 * row, 4);
  dev::store_shared(memory, 0, uint4{x, y, z, w});
}

// a query's constant, where load_quad finds it for rows g and g + 8 of S^T
__device__ __forceinline__ void store_twice(uint32_t quads, int query, float x) {
  const dev::Shared<float> quad(quads + query / 2 * 16, 4);
  quad[query % 2] = quad[query % 2 + 2] = x;
}

// Reads a warp's strip of queries tile by tile; the lane's part of the addresses is here, so that
// the rest is a constant of the instruction.
class Strip {
 public:
  __device__ explicit Strip(uint32_t strip) {
    const uint32_t lane = threadIdx.x % 32;
    panels_ = opaque(strip + lane % 16 * 16);
    halves_ = opaque(strip + lane / 16 * 128 + lane % 8 * 16);
    row_ = opaque(strip + lane % 4 * 16);
    pairs_ = opaque(strip + lane % 4 * 4);
    second_ = lane / 16, odd_ = lane / 8 % 2;
  }

  // rows for ldmatrix of 16 queries: the tile's two halves in panel a, then in panel b
  __device__ __forceinline__ const unsigned char* panels(uint32_t a, uint32_t b, int tile) const {
    return at(panels_ + (second_ ? b - a : 0) + a + 256 * tile, 16);
  }
  // the tile's first half in panels a and b, then its second half
  __device__ __forceinline__ const unsigned char* halves(uint32_t a, uint32_t b, int tile) const {
    return at(halves_ + (odd_ ? b - a : 0) + a + 256 * tile, 16);
  }
  // constants of queries 8i + 2t, 8i + 2t + 1, where store_twice has put them
  __device__ __forceinline__ void quad(uint32_t quads, int i, float (&x)[4]) const {
    const dev::Shared<float> memory(row_ + quads + 64 * i, 4);
    const float4 quad = dev::load_shared<float4>(memory, 0);
    x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
  }
  // the same of 16 bits each
  __device__ __forceinline__ uint32_t pair(uint32_t pairs, int i) const {
    return dev::Shared<uint32_t>(pairs_ + pairs + 16 * i, 1)[0];
  }

 private:
  __device__ __forceinline__ static const unsigned char* at(uint32_t offset, uint32_t bytes) {
    return dev::Shared<unsigned char>(offset, bytes).ptr(0, bytes);
  }

  uint32_t panels_, halves_, row_, pairs_;
  bool second_, odd_;
};

// One block's sums of dK and dV, tile i of the 32 lanes as float4; in either memory.
struct SharedSums {
  dev::Shared<float> data;

  __device__ SharedSums(uint32_t offset, uint32_t bytes) : data(offset, bytes / 4) {}
  __device__ __forceinline__ void load(int i, float (&x)[4]) const {
    const float4 quad = dev::load_shared<float4>(data, 128 * i + 4 * (threadIdx.x % 32));
    x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
  }
  __device__ __forceinline__ void store(int i, const float (&x)[4]) const {
    const uint32_t at = 128 * i + 4 * (threadIdx.x % 32);
    dev::store_shared(data, at, float4{x[0], x[1], x[2], x[3]});
  }
};

struct GlobalSums {
  float* data;
  bool valid;

  __device__ __forceinline__ void load(int i, float (&x)[4]) const {
    float4 quad{0, 0, 0, 0};
    if (valid) quad = reinterpret_cast<const float4*>(data)[32 * i + threadIdx.x % 32];
    x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
  }
  __device__ __forceinline__ void store(int i, const float (&x)[4]) const {
    if (valid)
      reinterpret_cast<float4*>(data)[32 * i + threadIdx.x % 32] = float4{x[0], x[1], x[2], x[3]};
  }
};

// ---- keys that take part ----

template <class T>
__device__ __forceinline__ bool takes_part(const Arguments<T>& a, int64_t b, int key) {
  return !a.key_mask || a.key_mask[b * a.mask_b + key * a.mask_s];
}

// the image's first key that takes part, or 0
template <class T>
__device__ __forceinline__ int first_key(const Arguments<T>& a, int64_t b) {
  if (!a.key_mask) return 0;
  int found = 0;
  while (found < a.S && !takes_part(a, b, found)) ++found;
  return found < a.S ? found : 0;
}

// ---- factors of a head ----

template <class T>
__device__ __forceinline__ float output_factor(const Arguments<T>& a, int h) {
  return (a.head_scale ? a.head_scale[h] : 1.0f) * a.keep_factor;
}

// 1 / output_factor; 0 for a head so faint that it has no gradients
template <class T>
__device__ __forceinline__ float inverse_factor(const Arguments<T>& a, int h) {
  const float factor = output_factor(a, h);
  return fabsf(factor) < 1e-30f ? 0.0f : 1 / factor;
}

// the warp's part of sum(dV * V), before head_scale
template <class T>
__device__ __forceinline__ void store_dhead_scale(const Arguments<T>& a, int64_t b, int h, int part,
                                                  float weight) {
  for (int mask = 16; mask > 0; mask /= 2) weight += dev::shfl_xor(weight, mask);
  if (threadIdx.x % 32 == 0)
    a.dhead_scale[(b * a.H + h) * a.warps_per_head + part] = weight * a.keep_factor;
}

// ---- dropout ----

// Random bits of a 64-key block in the layout of S^T tiles: Philox 4x32-7, as keep_mask in
// ops/attention/reference.py. The keys of call c = 8 * block + g are the lane's rows.
struct Philox {
  static constexpr int ROUNDS = 7;
  uint32_t key[2], call, query, head, offset, either;

  template <class T>
  __device__ __forceinline__ Philox(const Arguments<T>& a, int64_t head, int first_query, int block)
      : head(uint32_t(head)), offset(a.offset), either(a.either) {
    const int lane = threadIdx.x % 32;
    const uint64_t seed = a.seed ? uint64_t(*a.seed) : 0;
    key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
    call = 8 * block + lane / 4, query = first_query + lane % 4 * 2;
  }

  // words[i] of queries 2t, 2t+1, 2t+8, 2t+9 of a tile; word m serves key tile m. Its bits 15 and
  // 31 say whether the weights of rows g and g + 8 stay
  __device__ __forceinline__ void draw(int tile, uint32_t (&words)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i][0] = call, words[i][1] = query + 16 * tile + i % 2 + i / 2 * 8;
      words[i][2] = head, words[i][3] = 0;
    }
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t(&x)[4] = words[i];
        const uint64_t a = uint64_t(x[0]) * 0xD2511F53u, b = uint64_t(x[2]) * 0xCD9E8D57u;
        x[0] = uint32_t(b >> 32) ^ x[1] ^ k0, x[1] = uint32_t(b);
        x[2] = uint32_t(a >> 32) ^ x[3] ^ k1, x[3] = uint32_t(a);
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int w = 0; w < 4; ++w) words[i][w] = kept(words[i][w]);
  }

  // masks of key tile m, all ones where a weight stays: [2n + r] is query half n, rows 8r..8r+7
  __device__ __forceinline__ void keep_pairs(const uint32_t (&words)[4][4], int m,
                                             uint32_t (&mask)[4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mask[2 * n] = spread_bits<false>(words[2 * n][m], words[2 * n + 1][m]);
      mask[2 * n + 1] = spread_bits<true>(words[2 * n][m], words[2 * n + 1][m]);
    }
  }

 private:
  // bits 15 and 31: whether each half of x is at least the threshold. The sum's top bit compares
  // the lower 15 bits; the top bit of x joins it by `or` for a threshold below 0x8000, else `and`
  __device__ __forceinline__ uint32_t kept(uint32_t x) const {
    const uint32_t low = (x & 0x7fff7fffu) + offset;
    return (x & low) | (either & (x | low));
  }
};

}  // namespace attention_bwd
