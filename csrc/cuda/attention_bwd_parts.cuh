// Arguments of attention's backward kernels and the pieces that they are put together from.

#pragma once

#include <cmath>

#include "attention_common.cuh"

namespace attention::bwd {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block

// one backward call, laid over blocks by plan_backward
struct Plan {
  Backward call;
  int warps_per_head;  // 1, 2 or 4
  int strip;           // queries of a warp in one round, a multiple of 16
  int access;          // elements of one access to global memory: 1, 2, 4 or 8
  float factor;        // of the logits, in units of log 2
  float factor_rest;   // what rounding took from it
  float keep_factor;   // of the weights that dropout keeps; 1 without dropout
};

// a token of a head; 32 bits hold the offset, see offsets_fit
template <class T>
__device__ __forceinline__ const T* token(const InputRows& rows, int64_t b, int h, int n) {
  return static_cast<const T*>(rows.data) + b * rows.image + h * rows.head + n * int(rows.row);
}
template <class T>
__device__ __forceinline__ T* token(const OutputRows& rows, int64_t b, int h, int n) {
  return static_cast<T*>(rows.data) + b * rows.image + h * rows.head + n * int(rows.row);
}

// ---- numbers ----

__device__ __forceinline__ float exp2(float x, bool emulated) {
  return emulated ? exp2_polynomial(fmaxf(x, -kPolynomialLimit)) : dev::exp2(x);
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

// x, of which the compiler knows nothing: it neither splits sums nor makes x again from its parts
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// two right operands, from ldmatrix addresses of Strip::halves
template <class Address>
__device__ __forceinline__ void load_halves(uint32_t (&b)[2][2], Address row) {
  uint32_t x[4];
  dev::ldmatrix_x4(x, row);
  b[0][0] = x[0], b[0][1] = x[1], b[1][0] = x[2], b[1][1] = x[3];
}

// ---- global memory ----

template <int kElements>
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
template <class T, int kWidth>
__device__ __forceinline__ void load_row(const T* row, const Plan& plan, bool valid,
                                         uint32_t (&x)[kWidth / 2]) {
  constexpr int kWidest = kWidth == 4 ? 4 : 8;
#pragma unroll
  for (int p = 0; p < kWidth / 2; ++p) x[p] = 0;
  if (!valid) return;
  if (plan.access >= kWidest) {
    using Word = typename Words<kWidest>::Type;
#pragma unroll
    for (int c = 0; c < kWidth; c += kWidest) {
      if (c < plan.call.in.D) {
        const Word word = *reinterpret_cast<const Word*>(row + c);
        x[c / 2] = word.x, x[c / 2 + 1] = word.y;
        if constexpr (kWidest == 8) x[c / 2 + 2] = word.z, x[c / 2 + 3] = word.w;
      }
    }
  } else if (plan.access >= 2) {
#pragma unroll
    for (int c = 0; c < kWidth; c += 2)
      if (c < plan.call.in.D) x[c / 2] = *reinterpret_cast<const uint32_t*>(row + c);
  } else {
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      if (c < plan.call.in.D) x[c / 2] |= uint32_t(row[c].bits) << (c % 2 * 16);
  }
}

// Two neighbouring channels as the registers hold them: a word of 16-bit elements, or two floats.
template <class T>
struct PairOf {
  using Type = uint32_t;
};
template <>
struct PairOf<float> {
  using Type = float2;
};
template <class T>
using Pair = typename PairOf<T>::Type;

__device__ __forceinline__ uint32_t join(dev::Bf16 x, dev::Bf16 y) {
  return x.bits | uint32_t(y.bits) << 16;
}
__device__ __forceinline__ uint32_t join(dev::Fp16 x, dev::Fp16 y) {
  return x.bits | uint32_t(y.bits) << 16;
}
__device__ __forceinline__ float2 join(float x, float y) { return {x, y}; }

// Channels c and c + 1 of several rows, zeros behind D: one kind of access for all, no branch
// between the loads, so that they are under way together.
template <class T, int kRows>
__device__ __forceinline__ void load_pairs(const T* const (&rows)[kRows], int c, const Plan& plan,
                                           Pair<T> (&x)[kRows]) {
  const int D = plan.call.in.D;
  const bool first = c < D, second = c + 1 < D;
  const int at = first ? c : 0, next = second ? c + 1 : 0;
  if (plan.access >= 2) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = *reinterpret_cast<const Pair<T>*>(rows[i] + at);
  } else {
    T lo[kRows], hi[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) lo[i] = rows[i][at], hi[i] = rows[i][next];
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = join(lo[i], second ? hi[i] : T{});
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) x[i] = first ? x[i] : Pair<T>{};
}

// one row, or zeros without an access
__device__ __forceinline__ float2 load_pair(const float* row, int c, const Plan& plan, bool valid) {
  float2 x[1] = {{0, 0}};
  const float* const rows[1] = {row};
  if (valid) load_pairs<float>(rows, c, plan, x);
  return x[0];
}

template <class T>
__device__ __forceinline__ void store_pair(T* row, int c, const Plan& plan, bool valid, float lo,
                                           float hi) {
  const bool first = valid && c < plan.call.in.D, second = valid && c + 1 < plan.call.in.D;
  if (plan.access >= 2) {
    if constexpr (sizeof(T) == 4) {
      if (first) *reinterpret_cast<float2*>(row + c) = {lo, hi};
    } else {
      const uint32_t pair = dev::pack<T>(lo, hi);
      if (first) *reinterpret_cast<uint32_t*>(row + c) = pair;
    }
  } else {
    if (first) row[c] = dev::from_float<T>(lo);
    if (second) row[c + 1] = dev::from_float<T>(hi);
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
  quad[query % 2] = x;
  quad[query % 2 + 2] = x;
}

// Reads a warp's strip of queries tile by tile; the lane's part of the addresses is here, so that
// the rest is a constant of the instruction.
class Strip {
  // 16 bytes of shared memory
  __device__ __forceinline__ static auto at(uint32_t offset) {
    return dev::Shared<uint16_t>(offset, 8).ptr(0, 8);
  }

 public:
  __device__ explicit Strip(uint32_t strip) {
    const uint32_t lane = threadIdx.x % 32;
    start_ = strip;
    panels_ = opaque(strip + lane % 16 * 16);
    halves_ = opaque(strip + lane / 16 * 128 + lane % 8 * 16);
    row_ = opaque(strip + lane % 4 * 16);
    pairs_ = opaque(strip + lane % 4 * 4);
    second_ = lane / 16, odd_ = lane / 8 % 2;
  }

  __device__ __forceinline__ uint32_t start() const { return start_; }

  // rows for ldmatrix of 16 queries: the tile's two halves in panel a, then in panel b
  __device__ __forceinline__ auto panels(uint32_t a, uint32_t b, int tile) const {
    return at(panels_ + (second_ ? b - a : 0) + a + 256 * tile);
  }
  // the tile's first half in panels a and b, then its second half
  __device__ __forceinline__ auto halves(uint32_t a, uint32_t b, int tile) const {
    return at(halves_ + (odd_ ? b - a : 0) + a + 256 * tile);
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
  uint32_t start_, panels_, halves_, row_, pairs_;
  bool second_, odd_;
};

// One block's sums of dK and dV, tile i of the 32 lanes as float4; in either memory.
struct SharedSums {
  uint32_t offset;

  __device__ __forceinline__ dev::Shared<float> lane(int i) const {
    return {offset + 512 * i + 16 * (threadIdx.x % 32), 4};
  }
  __device__ __forceinline__ void load(int i, float (&x)[4]) const {
    const float4 quad = dev::load_shared<float4>(lane(i), 0);
    x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
  }
  __device__ __forceinline__ void store(int i, const float (&x)[4]) const {
    dev::store_shared(lane(i), 0, float4{x[0], x[1], x[2], x[3]});
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

// dK and dV of one block: row tile m, 8 channels n, in the layout of an MMA result.
template <int kTiles, int kPanels>
struct Sums {
  float dk[kTiles][kPanels][4], dv[kTiles][kPanels][4];

  // sums of another warp, or of an earlier round
  template <class Memory>
  __device__ __forceinline__ void load_sums(const Memory& memory) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kPanels; ++n) {
        memory.load(2 * (m * kPanels + n), dk[m][n]);
        memory.load(2 * (m * kPanels + n) + 1, dv[m][n]);
      }
  }

  template <class Memory>
  __device__ __forceinline__ void store_sums(const Memory& memory) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kPanels; ++n) {
        memory.store(2 * (m * kPanels + n), dk[m][n]);
        memory.store(2 * (m * kPanels + n) + 1, dv[m][n]);
      }
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kPanels; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[m][n][e] = dv[m][n][e] = 0;
  }
};

// ---- keys that take part, factors of a head ----

__device__ __forceinline__ bool takes_part(const Inputs& in, int64_t b, int key) {
  return in.key_mask[b * in.mask_image + key * in.mask_key];
}

// the image's first key that takes part, or -1
__device__ __forceinline__ int first_key(const Inputs& in, int64_t b) {
  if (!in.key_mask) return 0;
  int key = 0;
  while (key < in.S && !takes_part(in, b, key)) ++key;
  return key < in.S ? key : -1;
}

// bit i: whether key first + 8 i takes part
template <int kOctets>
__device__ __forceinline__ uint32_t taking_part(const Inputs& in, int64_t b, int first) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) bits |= uint32_t(first + 8 * i < in.S) << i;
  if (in.key_mask) {
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < kOctets; ++i)
      kept |= uint32_t(takes_part(in, b, min(first + 8 * i, in.S - 1))) << i;
    bits &= kept;
  }
  return bits;
}

__device__ __forceinline__ float output_factor(const Plan& plan, int h) {
  const float* head_scale = plan.call.in.head_scale;
  return (head_scale ? head_scale[h] : 1.f) * plan.keep_factor;
}

// 1 / output_factor; 0 for a head so faint that it has no gradients
__device__ __forceinline__ float inverse_factor(const Plan& plan, int h) {
  const float factor = output_factor(plan, h);
  return fabsf(factor) < 1e-30f ? 0.f : 1 / factor;
}

// ---- dropout ----

// Random bits of a 64-key block in the layout of S^T: a lane's rows g, g + 8, ... are the keys of
// one call.
struct TileBits {
  uint32_t key[2], call, query, head, addend;
  int first_word;  // of a block with fewer than 64 keys

  __device__ __forceinline__ TileBits(const Inputs& in, int64_t head, int first_query,
                                      int first_key)
      : head(uint32_t(head)), addend(keep_addend(in.threshold)), first_word(first_key % 64 / 16) {
    const int lane = threadIdx.x % 32;
    const uint64_t seed = in.seed ? uint64_t(*in.seed) : 0;
    key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
    call = first_key / 64 * 8 + lane / 4, query = first_query + lane % 4 * 2;
  }

  // words[i] of queries 2t, 2t + 1, 2t + 8, 2t + 9 of a tile; word m serves key tile m. Bits 15 and
  // 31 say whether the weights of rows g and g + 8 stay. The four calls of attention::Philox side
  // by side share the additions to their key
  template <int kKeyTiles>
  __device__ __forceinline__ void draw(int tile, uint32_t (&words)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i][0] = call, words[i][1] = query + 16 * tile + i % 2 + i / 2 * 8;
      words[i][2] = head, words[i][3] = 0;
    }
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 7; ++round) {
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
    for (int i = 0; i < 4; ++i) {
      if constexpr (kKeyTiles < 4) {
        if (first_word & 2) words[i][0] = words[i][2], words[i][1] = words[i][3];
      }
      if constexpr (kKeyTiles < 2) {
        if (first_word & 1) words[i][0] = words[i][1];
      }
#pragma unroll
      for (int w = 0; w < kKeyTiles; ++w) words[i][w] = keep_signs(words[i][w], addend);
    }
  }

  // masks of key tile m, all ones where a weight stays: [2n + r] is query half n, rows 8r..8r+7
  __device__ __forceinline__ static void masks(const uint32_t (&words)[4][4], int m,
                                               uint32_t (&mask)[4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mask[2 * n] = keep_pair<0>(words[2 * n][m], words[2 * n + 1][m]);
      mask[2 * n + 1] = keep_pair<1>(words[2 * n][m], words[2 * n + 1][m]);
    }
  }
};

}  // namespace attention::bwd
