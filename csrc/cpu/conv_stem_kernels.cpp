#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "conv_stem.h"
#include "instruction_set.h"

namespace {

namespace portable {
constexpr int LANES = 4;
#include "vectors.inl"
#include "conv_stem.inl"
#include "conv_stem_backward.inl"
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
#include "vectors.inl"
#include "conv_stem.inl"
#include "conv_stem_backward.inl"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int LANES = 16;
#include "vectors.inl"
#include "conv_stem.inl"
#include "conv_stem_backward.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class T>
StemKernels<T> choose() {
#ifdef __x86_64__
  const InstructionSet widest = instruction_set();
  if (widest == InstructionSet::Avx512) {
    return {avx512::BLOCK, avx512::stem_forward<T>, avx512::stem_backward<T>,
            avx512::stem_scatter<T>};
  }
  if (widest == InstructionSet::Avx2) {
    return {avx2::BLOCK, avx2::stem_forward<T>, avx2::stem_backward<T>, avx2::stem_scatter<T>};
  }
#endif
  return {portable::BLOCK, portable::stem_forward<T>, portable::stem_backward<T>,
          portable::stem_scatter<T>};
}

}  // namespace

template <class T>
const StemKernels<T>& stem_kernels() {
  static const StemKernels<T> chosen = choose<T>();
  return chosen;
}

template const StemKernels<float>& stem_kernels();
template const StemKernels<Bfloat16>& stem_kernels();
