// Numbers as tensors hold them and as the kernels compute with them.

#pragma once

#include <cstdint>
#include <cstring>

// storage of bfloat16: the upper half of a float
enum class Bfloat16 : uint16_t {};

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
  return static_cast<Bfloat16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
}
