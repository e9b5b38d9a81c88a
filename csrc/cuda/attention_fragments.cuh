// Keys and values of a few heads in shared memory, in the order in which tensor-core operands are
// read, and the products with them.
//
// A group is 32 keys, four blocks m of 8. Lane (g = lane / 4, t = lane % 4) reads, in vectors of
// four words:
//   keys    key 8m + g, kKeyWords words: its channels, times the logits' factor, as high and low
//           part in the operand's type, so that the factor costs no accuracy. Behind those of the
//           group, kRestWords each: what two tf32 parts leave of fp32's 24 bits, at times one
//   values  keys 8m + 2t and 8m + 2t + 1 of channel g, kValueWords words. Row D of the values holds
//           ones: a product with it sums the weights
// Keys that take no part (padding, key_mask) have values and ones of zero. Their key is a copy of
// one that does, so that they leave the largest score alone.

#pragma once

#include <type_traits>

#include "attention_common.cuh"

namespace attention {

constexpr int kGroup = 32;  // keys

template <class T>
constexpr bool kSingle = sizeof(T) == 4;

// kD: channels a row of operands has room for: 4, 8 or 16
template <class T, int kD>
struct Layout {
  static constexpr int kKeyWords = kSingle<T> ? kD / 2 : kD / 4;  // of one lane, for 8 keys
  static constexpr int kValueWords = kSingle<T> ? 4 : 1;
  // of 4 channels with the high part again: it is the other half of an operand
  static constexpr int kRestWords = !kSingle<T> ? 0 : kD == 4 ? 2 : kD / 4;
  static constexpr int kKeyGroup = (kKeyWords + kRestWords) * 4 * 32;  // words of a group
  __host__ __device__ static constexpr int value_group(int D) { return kValueWords * (D + 1) * 16; }
  __host__ __device__ static constexpr int head_words(int D, int groups) {
    return groups * (kKeyGroup + value_group(D));
  }
};

struct HeadMemory {
  dev::Shared<uint32_t> words;
  uint32_t keys, values;  // first word
};

// ---- rows in global memory ----

template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
  T x[kCount];
};

template <class T, int kD>
__device__ __forceinline__ void load_row(T (&x)[kD], const T* row, int D, bool vector) {
  if (vector) {
    const auto whole = *reinterpret_cast<const Vector<T, kD>*>(row);
#pragma unroll
    for (int c = 0; c < kD; ++c) x[c] = whole.x[c];
  } else {
#pragma unroll
    for (int c = 0; c < kD; ++c) x[c] = c < D ? row[c] : T{};
  }
}

// ---- splitting a number into two of the operand's type ----

// words of two neighbouring channels (of one for fp32)
template <class T>
__device__ __forceinline__ void split_pair(uint32_t& high, uint32_t& low, float a, float b) {
  if constexpr (std::is_same_v<T, dev::Fp16>) {
    // the factor may carry a large value past fp16's range: then the low part takes the rest
    constexpr float kLargest = 65504.f;
    high = dev::pack<T>(fminf(fmaxf(a, -kLargest), kLargest), fminf(fmaxf(b, -kLargest), kLargest));
  } else {
    high = dev::pack<T>(a, b);
  }
  low = dev::pack<T>(a - dev::unpack_lo<T>(high), b - dev::unpack_hi<T>(high));
}

// of a * factor; returns what is left
__device__ __forceinline__ float split_single(uint32_t& high, uint32_t& low, float a,
                                              float factor = 1.f) {
  high = dev::to_tf32(a * factor) & 0xffffe000u;  // the other bits are not defined
  const float left = dev::fma(a, factor, -dev::bits_float(high));
  low = dev::to_tf32(left) & 0xffffe000u;
  return left - dev::bits_float(low);
}

// ---- writing ----

template <class T, int kD>
__device__ __forceinline__ void store_key(const HeadMemory& head, int key, const T (&x)[kD],
                                          float factor) {
  using Lay = Layout<T, kD>;
  const int m = key % kGroup / 8, g = key % 8;
  const uint32_t base = head.keys + key / kGroup * Lay::kKeyGroup + g * 16;
  const auto put_word = [&](int t, int w, uint32_t word) {
    head.words[base + w / 4 * 128 + t * 4 + w % 4] = word;
  };
  const auto put = [&](int t, int i, uint32_t word) { put_word(t, m * Lay::kKeyWords + i, word); };
#pragma unroll
  for (int c = 0; c < kD; c += kSingle<T> ? 1 : 2) {
    uint32_t high, low;
    if constexpr (kSingle<T>) {
      const float rest = split_single(high, low, x[c], factor);
      const int at = 4 * Lay::kKeyWords + m * Lay::kRestWords + c / 4;
      put_word(c % 4, at, dev::float_bits(rest));
      if constexpr (kD == 4) put_word(c % 4, at + 1, high);
      const int part = kD == 4 ? 1 : 2, i = c / 8 * 4 + c % 8 / 4;
      put(c % 4, i, high);
      put(c % 4, i + part, low);
    } else {
      split_pair<T>(high, low, factor * dev::to_float(x[c]), factor * dev::to_float(x[c + 1]));
      if constexpr (kD == 4) {
        put(c / 2, 0, high);
        put(c / 2 + 2, 0, low);
      } else {
        put(c % 8 / 2, c / 8, high);
        put(c % 8 / 2, c / 8 + kD / 8, low);
      }
    }
  }
}

// values of channel `row` at the keys `key` (even) and key + 1
template <class T, int kD>
__device__ __forceinline__ void store_values(const HeadMemory& head, int D, int key, int row, T a,
                                             T b) {
  using Lay = Layout<T, kD>;
  const int w = key % kGroup / 8 * Lay::kValueWords, t = key % 8 / 2;
  const uint32_t place = head.values + key / kGroup * Lay::value_group(D) +
                         (w / 4 * (D + 1) + row) * 16 + t * 4 + w % 4;
  if constexpr (kSingle<T>) {
    uint4 words;
    split_single(words.x, words.z, a);
    split_single(words.y, words.w, b);
    dev::store_shared(head.words, place, words);
  } else {
    head.words[place] = a.bits | uint32_t(b.bits) << 16;
  }
}

// ---- reading ----

template <int kCount>
__device__ __forceinline__ void load_words(uint32_t (&to)[kCount], const HeadMemory& head,
                                           uint32_t from, int stride) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint4 words = dev::load_shared<uint4>(head.words, from + i / 4 * stride);
    to[i] = words.x, to[i + 1] = words.y, to[i + 2] = words.z, to[i + 3] = words.w;
  }
}

template <class T, int kD>
using KeyWords = uint32_t[4 * Layout<T, kD>::kKeyWords];
template <class T, int kD>
using RestWords = uint32_t[kSingle<T> ? 4 * Layout<T, kD>::kRestWords : 1];
template <class T, int kD>
using ValueWords = uint32_t[4 * Layout<T, kD>::kValueWords];

template <class T, int kD>
__device__ __forceinline__ void load_keys(KeyWords<T, kD>& words, const HeadMemory& head,
                                          int group, int lane) {
  load_words(words, head, head.keys + group * Layout<T, kD>::kKeyGroup + lane * 4, 128);
}

template <class T, int kD>
__device__ __forceinline__ void load_rests(RestWords<T, kD>& words, const HeadMemory& head,
                                           int group, int lane) {
  using Lay = Layout<T, kD>;
  if constexpr (kSingle<T>) {
    const uint32_t from = head.keys + group * Lay::kKeyGroup + Lay::kKeyWords * 128;
    load_words(words, head, from + lane * 4, 128);
  }
}

template <class T, int kD>
__device__ __forceinline__ void load_values(ValueWords<T, kD>& words, const HeadMemory& head,
                                            int D, int group, int row, int lane) {
  const uint32_t from = head.values + group * Layout<T, kD>::value_group(D) + row * 16;
  load_words(words, head, from + lane % 4 * 4, (D + 1) * 16);
}

// ---- 16 queries ----

// two neighbouring channels in one access
template <class T>
using Pair = std::conditional_t<kSingle<T>, uint2, uint32_t>;

template <class T, int kD>
struct Queries {
  // rows g and g + 8 of the queries at the channels of a lane, as the operand's registers
  uint32_t high[kD == 4 ? 2 : kD == 8 || !kSingle<T> ? 4 : 8];
  uint32_t low[kSingle<T> ? kD / 2 : 1];
  uint32_t rest[!kSingle<T> ? 1 : kD == 4 ? 4 : kD / 2];  // of 4 channels with high again

  // kPairs: D is even and rows are aligned for Pair
  template <bool kPairs>
  __device__ __forceinline__ void load(const T* const (&row)[2], int D, int lane) {
    const int t = lane % 4;
    if constexpr (kSingle<T>) {
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) {
        const int c = t + i / 2 * 4;
        rest[i] = dev::float_bits(split_single(high[i], low[i], c < D ? row[i % 2][c] : 0.f));
        // a register of its own: the compiler would otherwise copy it for every product
        if constexpr (kD == 4) rest[2 + i] = dev::shfl(high[i], lane);
      }
    } else {
      low[0] = rest[0] = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        high[i] = pair<kPairs>(row[i], kD == 4 ? 2 * (t % 2) : 2 * t, D);
        if constexpr (kD == 8) high[2 + i] = dev::shfl(high[i], lane);
        if constexpr (kD == 16) high[2 + i] = pair<kPairs>(row[i], 2 * t + 8, D);
      }
    }
  }

  template <bool kPairs>
  static __device__ __forceinline__ uint32_t pair(const T* row, int c, int D) {
    if constexpr (kPairs) return c < D ? *reinterpret_cast<const uint32_t*>(row + c) : 0;
    return (c < D ? row[c].bits : 0) | uint32_t(c + 1 < D ? row[c + 1].bits : 0) << 16;
  }
};

// how exactly fp32 logits are computed: the parts of both factors that are multiplied
enum class Terms {
  Coarse,  // high x high, high x low, low x high: enough to find a maximum
  Two,     // and low x low: an error of a logit counts as many times as the logit is large
  Three    // and rest x high, high x rest
};

// the products of up to 8 channels that are smaller than high x high, the smallest first
template <int kD, Terms kTerms>
__device__ __forceinline__ void small_products(float (&s)[4], const uint32_t* high,
                                               const uint32_t* low, const uint32_t* rest,
                                               const uint32_t* k_high, const uint32_t* k_low,
                                               const uint32_t* k_rest) {
  if constexpr (kD == 4) {  // two terms of 4 channels in one product of 8
    if constexpr (kTerms == Terms::Three) {
      dev::mma_tf32_16x8x8(s, {rest[2], rest[3], rest[0], rest[1]}, {k_rest[0], k_rest[1]}, s);
    }
    if constexpr (kTerms != Terms::Coarse) dev::mma_tf32_16x8x4(s, {low[0], low[1]}, k_low[0], s);
    dev::mma_tf32_16x8x8(s, {low[0], low[1], high[0], high[1]}, {k_high[0], k_low[0]}, s);
  } else {
    const auto add = [&](const uint32_t* q, const uint32_t* k) {
      dev::mma_tf32_16x8x8(s, {q[0], q[1], q[2], q[3]}, {k[0], k[1]}, s);
    };
    if constexpr (kTerms == Terms::Three) add(rest, k_high), add(high, k_rest);
    if constexpr (kTerms != Terms::Coarse) add(low, k_low);
    add(low, k_high), add(high, k_low);
  }
}

// scores of 16 queries and block m's 8 keys, plus `start`. What is large meets the start first and
// leaves a small sum for the rest if kShifted, else it comes last
template <class T, int kD, Terms kTerms, bool kShifted>
__device__ __forceinline__ void scores(float (&s)[4], const Queries<T, kD>& q,
                                       const KeyWords<T, kD>& words, const RestWords<T, kD>& rests,
                                       int m, const float (&start)[4]) {
  const uint32_t* k = words + m * Layout<T, kD>::kKeyWords;
  if constexpr (!kSingle<T>) {
    if constexpr (kD == 4) {
      dev::mma_16x8x8<T>(s, q.high, k[0], start);
    } else {
      dev::mma_16x8x16<T>(s, q.high, {k[0], k[1]}, start);
      if constexpr (kD == 16) dev::mma_16x8x16<T>(s, q.high, {k[2], k[3]}, s);
    }
  } else {
    constexpr int kPart = kD == 4 ? 1 : 2, kSteps = kD == 16 ? 2 : 1;
    const uint32_t* k_rest = rests + m * Layout<T, kD>::kRestWords;
#pragma unroll
    for (int c = 0; c < 4; ++c) s[c] = start[c];
#pragma unroll
    for (int order = 0; order < 2; ++order) {
#pragma unroll
      for (int i = 0; i < 4 * kSteps; i += 4) {
        const uint32_t *high = q.high + i, *k_high = k + i;
        if ((order == 0) != kShifted) {
          small_products<kD, kTerms>(s, high, q.low + i, q.rest + i, k_high, k_high + kPart,
                                     k_rest + i / 2);
        } else if constexpr (kD == 4) {
          dev::mma_tf32_16x8x4(s, {high[0], high[1]}, k_high[0], s);
        } else {
          dev::mma_tf32_16x8x8(s, {high[0], high[1], high[2], high[3]}, {k_high[0], k_high[1]}, s);
        }
      }
    }
  }
}

// weights of 16 queries and 16 keys as operands: two blocks' results side by side
template <class T>
struct Weights {
  static constexpr int kWords = kSingle<T> ? 8 : 4;
  uint32_t high[kWords];
  uint32_t low[kSingle<T> ? kWords : 1];

  __device__ __forceinline__ Weights(const float (&p)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kSingle<T>) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          // the operand's columns t and t + 4 are the keys 2t and 2t + 1
          const float x = p[i][n % 2 * 2 + n / 2];
          const uint32_t rounded = (dev::float_bits(x) + 0x1000u) & 0xffffe000u;
          high[4 * i + n] = rounded;
          low[4 * i + n] = dev::float_bits(x - dev::bits_float(rounded));
        }
      } else {
        high[2 * i] = dev::pack<T>(p[i][0], p[i][1]);
        high[2 * i + 1] = dev::pack<T>(p[i][2], p[i][3]);
      }
    }
  }

  // zero what dropout drops; signs[row][column] as keep_signs gives them for the two blocks' word
  __device__ __forceinline__ void drop(const uint32_t (&signs)[2][2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if constexpr (kSingle<T>) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const uint32_t word = signs[row][column];
          const uint32_t even = keep_pair<0>(word, word), odd = keep_pair<1>(word, word);
          high[row + 2 * column] &= even, low[row + 2 * column] &= even;
          high[4 + row + 2 * column] &= odd, low[4 + row + 2 * column] &= odd;
        }
      } else {
        high[row] &= keep_pair<0>(signs[row][0], signs[row][1]);
        high[2 + row] &= keep_pair<1>(signs[row][0], signs[row][1]);
      }
    }
  }
};

// sum += weights @ values for blocks 2 j and 2 j + 1; ones have no low part
template <class T, int kD, bool kOnes = false>
__device__ __forceinline__ void multiply(float (&sum)[4], const Weights<T>& p,
                                         const ValueWords<T, kD>& v, int j) {
  if constexpr (kSingle<T>) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t *w = v + (2 * j + i) * 4, *h = p.high + 4 * i, *l = p.low + 4 * i;
      const uint32_t high[4] = {h[0], h[1], h[2], h[3]}, low[4] = {l[0], l[1], l[2], l[3]};
      if constexpr (!kOnes) dev::mma_tf32_16x8x8(sum, low, {w[2], w[3]}, sum);
      dev::mma_tf32_16x8x8(sum, low, {w[0], w[1]}, sum);
      if constexpr (!kOnes) dev::mma_tf32_16x8x8(sum, high, {w[2], w[3]}, sum);
      dev::mma_tf32_16x8x8(sum, high, {w[0], w[1]}, sum);
    }
  } else {
    dev::mma_16x8x16<T>(sum, p.high, {v[2 * j], v[2 * j + 1]}, sum);
  }
}

}  // namespace attention
