// Kernels whose registers, local memory and loops are known: for the test of sass.py.

#include "device.cuh"

// per iteration of a warp: 4 products of 16 x 8 scores, an exponential for each score of a lane
__global__ void __launch_bounds__(128) exponentials(const uint32_t* x, float* y, int n) {
  float sum = 0.f;
  const uint32_t a[2] = {x[threadIdx.x], x[threadIdx.x + 128]};
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float d[4] = {0.f, 0.f, 0.f, 0.f};
      dev::mma_16x8x8<dev::Bf16>(d, a, x[256 + i * 128 + j * 32 + threadIdx.x % 32], d);
#pragma unroll
      for (int r = 0; r < 4; ++r) sum += dev::exp2(d[r]);
    }
  }
  y[threadIdx.x] = sum;
}

// the index is known at run time only: the array must lie in local memory
__global__ void local_array(float* y, int n) {
  float values[32];
  for (int i = 0; i < 32; ++i) values[i] = y[i];
#pragma unroll 1
  for (int i = 0; i < n; ++i) values[(i * 7) % 32] += values[i % 32];
  y[n] = values[n % 32];
}

// more live values than a thread of so large a block has registers
__global__ void __launch_bounds__(1024) spilling(float* y) {
  float values[96], sum = 0.f;
#pragma unroll
  for (int i = 0; i < 96; ++i) sum += values[i] = y[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = values[i] * sum;
}
