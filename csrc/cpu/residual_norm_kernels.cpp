#include "residual_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "instruction_set.h"

namespace {

namespace portable {
constexpr int LANES = 4;
#include "vectors.inl"
#include "residual_norm.inl"
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
#include "vectors.inl"
#include "residual_norm.inl"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int LANES = 16;
#include "vectors.inl"
#include "residual_norm.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

NormKernels choose() {
#ifdef __x86_64__
  const InstructionSet widest = instruction_set();
  if (widest == InstructionSet::Avx512) {
    return {avx512::BLOCK, avx512::norm_forward, avx512::norm_backward};
  }
  if (widest == InstructionSet::Avx2) {
    return {avx2::BLOCK, avx2::norm_forward, avx2::norm_backward};
  }
#endif
  return {portable::BLOCK, portable::norm_forward, portable::norm_backward};
}

}  // namespace

const NormKernels& norm_kernels() {
  static const NormKernels chosen = choose();
  return chosen;
}
