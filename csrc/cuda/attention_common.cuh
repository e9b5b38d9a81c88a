// Device code that the forward and backward kernels of attention share: dropout's random bits and
// the exponential by polynomial.

#pragma once

#include "attention.h"
#include "device.cuh"

namespace attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// ---- dropout: the bits of reference.keep_mask ----
//
// Call c of query i serves the keys j with 8 (j / 64) + j % 8 = c; key j takes its half-word
// (j / 8) % 8. In the layout of an MMA result a thread owns columns 2t and 2t + 1 of every block of
// 8 keys, so that the calls 8 (j / 64) + 2t and + 2t + 1 serve 64 keys of its row and no others.

struct Philox {
  uint32_t key[2];
  uint32_t head;  // b H + h

  // words[row][column] of the calls call + column of the queries query + 8 row; the four go through
  // each round together, which shares the round's keys and the first products
  __device__ __forceinline__ void operator()(uint32_t call, uint32_t query,
                                             uint32_t (&words)[2][2][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t(&c)[4] = words[i / 2][i % 2];
      c[0] = call + i % 2, c[1] = query + i / 2 * 8, c[2] = head, c[3] = 0;
    }
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 7; ++round) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t(&c)[4] = words[i / 2][i % 2];
        const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
        c[0] = uint32_t(b >> 32) ^ c[1] ^ k0;
        c[1] = uint32_t(b);
        c[2] = uint32_t(a >> 32) ^ c[3] ^ k1;
        c[3] = uint32_t(a);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

// 65536 - threshold in both halves: a half-word that carries when this is added is kept
__device__ __forceinline__ uint32_t keep_addend(uint32_t threshold) {
  return (65536u - threshold) * 0x10001u;
}

// bits 15 and 31 tell which of a word's two half-words are >= threshold
__device__ __forceinline__ uint32_t keep_signs(uint32_t word, uint32_t addend) {
  const uint32_t sum = (word & 0x7fff7fffu) + (addend & 0x7fff7fffu);
  return (word & addend) | (word & sum) | (addend & sum);
}

// 0xffff in the low half where a keeps, in the high half where b does, for half-word 0 or 1 of both
template <int kHalf>
__device__ __forceinline__ uint32_t keep_pair(uint32_t a_signs, uint32_t b_signs) {
#ifdef __CUDACC__
  uint32_t r;  // a selector with bit 3 set repeats the sign of the byte
  asm("prmt.b32 %0, %1, %2, %3;"
      : "=r"(r)
      : "r"(a_signs), "r"(b_signs), "n"(kHalf ? 0xffbb : 0xdd99));
  return r;
#else
  const uint32_t sign = kHalf ? 0x80000000u : 0x8000u;
  return (a_signs & sign ? 0xffffu : 0) | (b_signs & sign ? 0xffff0000u : 0);
#endif
}

// the larger, or not a number if one of them is not
__device__ __forceinline__ float max_or_nan(float a, float b) {
#ifdef __CUDACC__
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a != a || a > b ? a : b;
#endif
}

// ---- 2^x on the FMA units, for |x| <= 125: relative error 7.5e-5, half a bit of bf16's 8 ----

constexpr float kPolynomialLimit = 125.f;

__device__ __forceinline__ float exp2_polynomial(float x) {
  const float shifted = x + 12582912.f;  // 1.5 2^23: its last bits are x rounded to an integer
  const float f = x - (shifted - 12582912.f);
  float p = dev::fma(f, 0x1.c3f760p-5f, 0x1.f0de1ap-3f);
  p = dev::fma(p, f, 0x1.62f31ap-1f);
  p = dev::fma(p, f, 0x1.fff692p-1f);
  return dev::bits_float(dev::float_bits(p) + (dev::float_bits(shifted) << 23));
}

}  // namespace attention
