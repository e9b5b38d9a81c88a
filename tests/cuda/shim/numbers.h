// Conversions and approximate functions as the device defines them.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace dev {

inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }

namespace host {

// value with the low bits dropped, rounded to nearest even
inline uint32_t round_even(uint32_t value, int bits) {
  const uint32_t half = (1u << (bits - 1)) - 1 + ((value >> bits) & 1);
  return (value + half) >> bits;
}

inline uint16_t bf16_bits(float x) {
  if (std::isnan(x)) return 0x7fff;  // the one NaN that the device makes
  return uint16_t(round_even(float_bits(x), 16));
}

inline uint16_t fp16_bits(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 65536 and more
  if (magnitude < 0x33000000u) return sign;            // less than half the smallest subnormal
  if (magnitude < 0x38800000u) {                       // subnormal
    const int shift = 126 - int(magnitude >> 23);
    return sign | uint16_t(round_even((magnitude & 0x7fffffu) | 0x800000u, shift));
  }
  return sign | uint16_t(round_even(magnitude - 0x38000000u, 13));
}

inline float fp16_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  const float value = std::ldexp(float(magnitude), -24);
  return sign ? -value : value;
}

inline float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
}

}  // namespace host

template <class T>
float to_float(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return bits_float(uint32_t(x.bits) << 16);
  } else {
    static_assert(std::is_same_v<T, Fp16>);
    return host::fp16_float(x.bits);
  }
}

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    return T{host::bf16_bits(x)};
  } else {
    static_assert(std::is_same_v<T, Fp16>);
    return T{host::fp16_bits(x)};
  }
}

template <class T>
uint32_t pack(float lo, float hi) {
  return from_float<T>(lo).bits | uint32_t(from_float<T>(hi).bits) << 16;
}
template <class T>
float unpack_lo(uint32_t x) {
  return to_float(T{uint16_t(x)});
}
template <class T>
float unpack_hi(uint32_t x) {
  return to_float(T{uint16_t(x >> 16)});
}

// the 13 low bits, whose value is not defined, hold the sum's: an mma must not look at them
inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  if (std::isnan(x)) return 0x7fffffffu;
  return std::isinf(x) ? bits : bits + 0x1000u;
}

// the device errs by up to two units in the last place here; these are rounded correctly
inline float exp2(float x) { return host::flush(float(std::exp2(double(host::flush(x))))); }
inline float log2(float x) { return host::flush(float(std::log2(double(host::flush(x))))); }
inline float rcp(float x) { return host::flush(1.f / host::flush(x)); }

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

inline uint32_t mul_hi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t sel) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= uint32_t((bytes >> 8 * (sel >> 4 * i & 7)) & 0xff) << 8 * i;
  return r;
}

}  // namespace dev
