#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "conv_stem.h"

namespace {

inline float to_float(float x) { return x; }

inline float to_float(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace portable {
constexpr int LANES = 4;
#include "conv_stem.inl"
#include "conv_stem_backward.inl"
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
#include "conv_stem.inl"
#include "conv_stem_backward.inl"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int LANES = 16;
#include "conv_stem.inl"
#include "conv_stem_backward.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class T>
StemKernels<T> choose() {
#ifdef __x86_64__
  // the switch that PyTorch's own CPU kernels obey
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = wish == nullptr ? "" : wish;
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && most != "avx2" && most != "default") {
    return {avx512::BLOCK, avx512::stem_forward<T>, avx512::stem_backward<T>,
            avx512::stem_scatter<T>};
  }
  if (has_avx2 && most != "default") {
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
