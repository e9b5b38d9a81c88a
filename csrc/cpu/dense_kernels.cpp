#include "dense.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "instruction_set.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")

namespace {

namespace portable {
constexpr int LANES = 4, ROWS = 1, COLUMNS = 8;
#include "vectors.inl"
#include "exp2.inl"
#include "dense.inl"
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8, ROWS = 2, COLUMNS = 4;
#include "vectors.inl"
#include "exp2.inl"
#include "dense.inl"
}  // namespace avx2
#pragma GCC pop_options

#define LSMHA_AVX512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int LANES = 16, ROWS = 8, COLUMNS = 2;
#include "vectors.inl"
#include "exp2.inl"
#include "dense.inl"
}  // namespace avx512

#define LSMHA_AVX512_BF16
#pragma GCC target("avx512bf16")
namespace avx512_bf16 {
constexpr int LANES = 16, ROWS = 8, COLUMNS = 2;
#include "vectors.inl"
#include "exp2.inl"
#include "dense.inl"
}  // namespace avx512_bf16
#undef LSMHA_AVX512_BF16
#pragma GCC pop_options
#undef LSMHA_AVX512
#endif

template <class T>
DenseKernels<T> choose() {
#ifdef __x86_64__
  const InstructionSet widest = instruction_set();
  if (widest == InstructionSet::Avx512) {
    if (sizeof(T) == 2 && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::dense_table<T>();
    return avx512::dense_table<T>();
  }
  if (widest == InstructionSet::Avx2) return avx2::dense_table<T>();
#endif
  return portable::dense_table<T>();
}

}  // namespace

template <class T>
const DenseKernels<T>& dense_kernels() {
  static const DenseKernels<T> chosen = choose<T>();
  return chosen;
}

template const DenseKernels<float>& dense_kernels();
template const DenseKernels<Bfloat16>& dense_kernels();
