// Picks the widest vectors that this processor has, once, for the pooling of neighbouring heads.

#pragma once

#include <cstdint>

// storage of bfloat16: the upper half of a float
enum class Bfloat16 : uint16_t {};

// x: H heads of D channels side by side, tokens stride_n apart; w and out: H x D
template <class T>
using PoolHeads = void (*)(const T* x, int64_t stride_n, int64_t N, int64_t H, int64_t D,
                           const float* w, float* out);

PoolHeads<float> pool_heads_float32();
PoolHeads<Bfloat16> pool_heads_bfloat16();
