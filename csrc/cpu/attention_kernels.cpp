#include "attention_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "bfloat16.h"
#include "instruction_set.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")

namespace {

// bits of 2^(i/32) less i << 18
struct Exp2Table {
  float value[32];

  Exp2Table() {
    for (uint32_t i = 0; i < 32; ++i) {
      const float power = static_cast<float>(std::exp2(i / 32.0));
      uint32_t bits;
      std::memcpy(&bits, &power, sizeof bits);
      bits -= i << 18;
      std::memcpy(&value[i], &bits, sizeof bits);
    }
  }
};

const Exp2Table exp2_table;

// the last part of every instruction set: which kernel takes a head. R: how many vectors of queries
// share what is loaded, as timed
#define LSMHA_FORWARD(D, R) \
  return h.keep ? forward_fused<D, R, true>(h, out, lse) : forward_fused<D, R, false>(h, out, lse)
#define LSMHA_BACKWARD(D) \
  return h.keep ? backward_fused<D, true>(h, g) : backward_fused<D, false>(h, g)
#define LSMHA_ENTRY(R)                                                \
  void forward(const AttentionHead& h, float* out, float* lse) {      \
    if (h.unshifted && h.bias == nullptr && h.S > 0) {                \
      switch (h.D) {                                                  \
        case 1: LSMHA_FORWARD(1, R);                                  \
        case 2: LSMHA_FORWARD(2, 1);                                  \
        case 4: LSMHA_FORWARD(4, 1);                                  \
        case 8: LSMHA_FORWARD(8, 1);                                  \
      }                                                               \
    }                                                                 \
    forward_tiled(h, out, lse);                                       \
  }                                                                   \
  void backward(const AttentionHead& h, const AttentionGradient& g) { \
    if (h.unshifted && h.bias == nullptr && h.S > 0) {                \
      switch (h.D) {                                                  \
        case 1: LSMHA_BACKWARD(1);                                    \
        case 2: LSMHA_BACKWARD(2);                                    \
        case 4: LSMHA_BACKWARD(4);                                    \
        case 8: LSMHA_BACKWARD(8);                                    \
      }                                                               \
    }                                                                 \
    backward_tiled(h, g);                                             \
  }

namespace portable {
constexpr int LANES = 4;
#include "vectors.inl"
#include "exp2.inl"
#include "attention_simd.inl"
#include "attention_philox.inl"
#include "attention_fused.inl"
#include "attention_tile.inl"
#include "attention_weights.inl"
#include "attention_transpose.inl"
LSMHA_ENTRY(1)
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
#define LSMHA_AVX2
#include "vectors.inl"
#include "exp2.inl"
#include "attention_simd.inl"
#include "attention_philox.inl"
#include "attention_fused.inl"
#include "attention_tile.inl"
#include "attention_weights.inl"
#include "attention_transpose.inl"
#undef LSMHA_AVX2
LSMHA_ENTRY(2)
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int LANES = 16;
#define LSMHA_AVX512
#include "vectors.inl"
#include "exp2.inl"
#include "attention_simd.inl"
#include "attention_philox.inl"
#include "attention_fused.inl"
#include "attention_tile.inl"
#include "attention_weights.inl"
#include "attention_transpose.inl"
#undef LSMHA_AVX512
LSMHA_ENTRY(4)
}  // namespace avx512
#pragma GCC pop_options
#endif

AttentionKernels choose() {
#ifdef __x86_64__
  const InstructionSet widest = instruction_set();
  if (widest == InstructionSet::Avx512) {
    return {avx512::largest_logit, avx512::forward, avx512::backward, avx512::add_weights,
            avx512::weights_backward, avx512::keep_bits, avx512::gather_block,
            avx512::scatter_block};
  }
  if (widest == InstructionSet::Avx2) {
    return {avx2::largest_logit, avx2::forward, avx2::backward, avx2::add_weights,
            avx2::weights_backward, avx2::keep_bits, avx2::gather_block,
            avx2::scatter_block};
  }
#endif
  return {portable::largest_logit, portable::forward, portable::backward, portable::add_weights,
          portable::weights_backward, portable::keep_bits, portable::gather_block,
          portable::scatter_block};
}

}  // namespace

const AttentionKernels& attention_kernels() {
  static const AttentionKernels chosen = choose();
  return chosen;
}
