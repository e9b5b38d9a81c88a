// Each intrinsic of device.cuh on words from memory: run by the shim and, where there is one, by a
// GPU. A warp per block; a lane reads 12 words and writes 8.

#pragma once

#include "device.cuh"

namespace intrinsics {

constexpr int kIn = 12, kOut = 8;

// words 0.. a, 4.. b, 8.. c; the product goes to words 0..3
template <class Multiply>
__device__ __forceinline__ void multiply(const uint32_t* in, uint32_t* out, Multiply mma) {
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
  const float c[4] = {dev::bits_float(in[8]), dev::bits_float(in[9]), dev::bits_float(in[10]),
                      dev::bits_float(in[11])};
  float d[4];
  mma(d, a, b, c);
  for (int i = 0; i < 4; ++i) out[i] = dev::float_bits(d[i]);
}

struct Mma {
  template <class T>
  struct K8 {
    __device__ void operator()(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               const float (&c)[4]) const {
      const uint32_t half[2] = {a[0], a[1]};
      dev::mma_16x8x8<T>(d, half, b[0], c);
    }
  };
  template <class T>
  struct K16 {
    __device__ void operator()(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               const float (&c)[4]) const {
      dev::mma_16x8x16<T>(d, a, b, c);
    }
  };
  struct Tf32K4 {
    __device__ void operator()(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               const float (&c)[4]) const {
      const uint32_t half[2] = {a[0], a[1]};
      dev::mma_tf32_16x8x4(d, half, b[0], c);
    }
  };
  struct Tf32K8 {
    __device__ void operator()(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               const float (&c)[4]) const {
      dev::mma_tf32_16x8x8(d, a, b, c);
    }
  };
};

// the lane's first four words become row `lane` of shared memory
__device__ __forceinline__ void load_matrices(const uint32_t* in, uint32_t* out, bool two,
                                              bool transposed) {
  const int lane = int(threadIdx.x);
  dev::Shared<uint16_t> rows(0, 32 * 8);
  dev::store_shared(rows, lane * 8, make_uint4(in[0], in[1], in[2], in[3]));
  dev::warp_barrier();
  uint32_t four[4], pair[2];
  if (two) {
    if (transposed) {
      dev::ldmatrix_x2_trans(pair, rows.ptr(lane * 8, 8));
    } else {
      dev::ldmatrix_x2(pair, rows.ptr(lane * 8, 8));
    }
    out[0] = pair[0];
    out[1] = pair[1];
    return;
  }
  if (transposed) {
    dev::ldmatrix_x4_trans(four, rows.ptr(lane * 8, 8));
  } else {
    dev::ldmatrix_x4(four, rows.ptr(lane * 8, 8));
  }
  for (int i = 0; i < 4; ++i) out[i] = four[i];
}

__device__ __forceinline__ void shuffle(const uint32_t* in, uint32_t* out) {
  out[0] = dev::shfl_xor(in[0], 1);
  out[1] = dev::shfl_xor(in[0], 16);
  out[2] = dev::shfl(in[0], 3);
  out[3] = dev::shfl(in[0], int(threadIdx.x / 4 * 4));
  out[4] = dev::float_bits(dev::shfl_xor(dev::bits_float(in[1]), 5));
  out[5] = dev::float_bits(dev::shfl(dev::bits_float(in[1]), 31 - int(threadIdx.x)));
  out[6] = dev::movmatrix(in[2]);
}

template <class T>
__device__ __forceinline__ void convert(const uint32_t* in, uint32_t* out) {
  const float x = dev::bits_float(in[0]), y = dev::bits_float(in[1]);
  out[0] = dev::pack<T>(x, y);
  out[1] = dev::from_float<T>(x).bits;
  out[2] = dev::float_bits(dev::unpack_lo<T>(in[2]));
  out[3] = dev::float_bits(dev::unpack_hi<T>(in[2]));
  out[4] = dev::float_bits(dev::to_float(T{uint16_t(in[2])}));
  out[5] = dev::to_tf32(x) & ~0x1fffu;
}

__device__ __forceinline__ void compute(const uint32_t* in, uint32_t* out) {
  const float x = dev::bits_float(in[0]), y = dev::bits_float(in[1]), z = dev::bits_float(in[2]);
  out[0] = dev::float_bits(dev::exp2(x));
  out[1] = dev::float_bits(dev::log2(x));
  out[2] = dev::float_bits(dev::rcp(x));
  out[3] = dev::float_bits(dev::fma(x, y, z));
  out[4] = dev::mul_hi(in[0], in[1]);
  out[5] = dev::byte_perm(in[0], in[1], in[3] & 0x7777u);
}

// 16 bytes, then 8 and 4, of which odd lanes get zeros
__device__ __forceinline__ void copy(const uint32_t* in, uint32_t* out) {
  const int lane = int(threadIdx.x);
  const bool valid = lane % 2 == 0;
  dev::Shared<uint32_t> words(0, 32 * 8);
  dev::cp_async16(words.ptr(lane * 8, 4), in, valid);
  dev::cp_async_commit();
  dev::cp_async8(words.ptr(lane * 8 + 4, 2), in + 4, valid);
  dev::cp_async4(words.ptr(lane * 8 + 6), in + 6, valid);
  dev::cp_async_commit();
  dev::cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) out[i] = words[lane * 8 + i];
  dev::cp_async_wait<0>();
  for (int i = 4; i < 7; ++i) out[i] = words[lane * 8 + i];
}

enum Op : int {
  MmaK8Bf16, MmaK8Fp16, MmaK16Bf16, MmaK16Fp16, MmaTf32K4, MmaTf32K8,
  Ldmatrix, LdmatrixTrans, LdmatrixX2, LdmatrixX2Trans,
  Shuffle, ConvertBf16, ConvertFp16, Compute, Copy
};

__global__ void __launch_bounds__(32) run(int op, const uint32_t* words, uint32_t* results) {
  const int64_t thread = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const uint32_t* in = words + thread * kIn;
  uint32_t* out = results + thread * kOut;
  switch (op) {
    case MmaK8Bf16: return multiply(in, out, Mma::K8<dev::Bf16>{});
    case MmaK8Fp16: return multiply(in, out, Mma::K8<dev::Fp16>{});
    case MmaK16Bf16: return multiply(in, out, Mma::K16<dev::Bf16>{});
    case MmaK16Fp16: return multiply(in, out, Mma::K16<dev::Fp16>{});
    case MmaTf32K4: return multiply(in, out, Mma::Tf32K4{});
    case MmaTf32K8: return multiply(in, out, Mma::Tf32K8{});
    case Ldmatrix: return load_matrices(in, out, false, false);
    case LdmatrixTrans: return load_matrices(in, out, false, true);
    case LdmatrixX2: return load_matrices(in, out, true, false);
    case LdmatrixX2Trans: return load_matrices(in, out, true, true);
    case Shuffle: return shuffle(in, out);
    case ConvertBf16: return convert<dev::Bf16>(in, out);
    case ConvertFp16: return convert<dev::Fp16>(in, out);
    case Compute: return compute(in, out);
    case Copy: return copy(in, out);
  }
}

}  // namespace intrinsics
