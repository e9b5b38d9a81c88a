#include "pool_heads.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

namespace {

inline float to_float(float x) { return x; }

inline float to_float(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
inline T from_float(float value);

template <>
inline float from_float(float value) { return value; }

template <>
inline Bfloat16 from_float(float value) {
  if (value != value) return Bfloat16{0x7fc0};
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<Bfloat16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

namespace portable {
constexpr int LANES = 4;
#include "pool_heads.inl"
#include "pool_heads_backward.inl"
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
#include "pool_heads.inl"
#include "pool_heads_backward.inl"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int LANES = 16;
#include "pool_heads.inl"
#include "pool_heads_backward.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class T>
PoolKernels<T> choose() {
#ifdef __x86_64__
  // the switch that PyTorch's own CPU kernels obey
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = wish == nullptr ? "" : wish;
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && most != "avx2" && most != "default") {
    return {avx512::pool_heads<T>, avx512::pool_heads_backward<T>};
  }
  if (has_avx2 && most != "default") return {avx2::pool_heads<T>, avx2::pool_heads_backward<T>};
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
