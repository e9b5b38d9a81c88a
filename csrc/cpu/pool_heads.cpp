#include "pool_heads.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "instruction_set.h"

namespace {

namespace portable {
constexpr int LANES = 4;
#include "vectors.inl"
#include "pool_heads.inl"
#include "pool_heads_backward.inl"
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
#include "vectors.inl"
#include "pool_heads.inl"
#include "pool_heads_backward.inl"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int LANES = 16;
#include "vectors.inl"
#include "pool_heads.inl"
#include "pool_heads_backward.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class T>
PoolKernels<T> choose() {
#ifdef __x86_64__
  const InstructionSet widest = instruction_set();
  if (widest == InstructionSet::Avx512) {
    return {avx512::pool_heads<T>, avx512::pool_heads_backward<T>};
  }
  if (widest == InstructionSet::Avx2) return {avx2::pool_heads<T>, avx2::pool_heads_backward<T>};
#endif
  return {portable::pool_heads<T>, portable::pool_heads_backward<T>};
}

}  // namespace

template <class T>
const PoolKernels<T>& pool_kernels() {
  static const PoolKernels<T> chosen = choose<T>();
  return chosen;
}

template const PoolKernels<float>& pool_kernels();
template const PoolKernels<Bfloat16>& pool_kernels();
