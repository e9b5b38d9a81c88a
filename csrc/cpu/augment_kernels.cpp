#include "augment.h"

#include <cstring>
#include <memory>

#include "instruction_set.h"

// a product and a sum are rounded apart, as Pillow's are; for that reason no target has "fma" either
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

// those of the standard library are compiled without the line above, so they would not be inlined
template <class T>
inline T lower(T a, T b) {
  return b < a ? b : a;
}

template <class T>
inline T upper(T a, T b) {
  return a < b ? b : a;
}

template <class T>
inline T between(T x, T low, T high) {
  return lower(upper(x, low), high);
}

namespace portable {
#include "augment_affine.inl"
#include "augment_bytes.inl"
#include "augment_image.inl"
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#include "augment_affine.inl"
#include "augment_bytes.inl"
#include "augment_image.inl"
}  // namespace avx2
#pragma GCC pop_options
#endif

AugmentKernels choose() {
#ifdef __x86_64__
  if (instruction_set() != InstructionSet::Portable) {
    return {avx2::augment_image, avx2::mixup};
  }
#endif
  return {portable::augment_image, portable::mixup};
}

}  // namespace

const AugmentKernels& augment_kernels() {
  static const AugmentKernels kernels = choose();
  return kernels;
}
