#include "augment.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

// a product and a sum are rounded apart, as Pillow's are; for that reason no target has "fma" either
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

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

AugmentImage choose() {
#ifdef __x86_64__
  // the switch that PyTorch's own CPU kernels obey
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && (wish == nullptr || std::string(wish) != "default")) {
    return avx2::augment_image;
  }
#endif
  return portable::augment_image;
}

}  // namespace

AugmentImage augment_kernel() {
  static const AugmentImage kernel = choose();
  return kernel;
}
