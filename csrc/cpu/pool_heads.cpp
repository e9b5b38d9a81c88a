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

namespace portable {
constexpr int LANES = 4;
#include "pool_heads.inl"
}  // namespace portable

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
#include "pool_heads.inl"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int LANES = 16;
#include "pool_heads.inl"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class T>
PoolHeads<T> choose() {
#ifdef __x86_64__
  // the switch that PyTorch's own CPU kernels obey
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = wish == nullptr ? "" : wish;
  if (most == "default") return portable::pool_heads<T>;
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && most != "avx2") return avx512::pool_heads<T>;
  if (has_avx2) return avx2::pool_heads<T>;
#endif
  return portable::pool_heads<T>;
}

}  // namespace

PoolHeads<float> pool_heads_float32() {
  static const PoolHeads<float> chosen = choose<float>();
  return chosen;
}

PoolHeads<Bfloat16> pool_heads_bfloat16() {
  static const PoolHeads<Bfloat16> chosen = choose<Bfloat16>();
  return chosen;
}
