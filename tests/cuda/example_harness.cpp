// Sums of rows by one warp each: what a kernel and its harness look like.

#include "harness.h"

// would stand in csrc/cuda/row_sums.cuh, included by the .cu that launches it and by this file
template <class T>
__global__ void __launch_bounds__(64) row_sums(const T* x, float* sums, int rows, int columns,
                                               int64_t stride) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.x * 2 + warp;
  dev::Shared<float> partial(0, 64);
  float sum = 0.f;
  if (row < rows) {
    for (int i = lane; i < columns; i += 32) sum += dev::to_float(x[row * stride + i]);
  }
  partial[threadIdx.x] = sum;
  dev::warp_barrier();
  sum += partial[threadIdx.x ^ 16];
  for (int mask = 8; mask > 0; mask /= 2) sum += dev::shfl_xor(sum, mask);
  if (row < rows && lane == 0) sums[row] = sum;
}

int main(int argc, char** argv) {
  const harness::Arguments in(argc, argv);
  const auto& x = in.tensor("x");
  harness::with_dtype(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int rows = int(x.size(0));
    dev::launch((rows + 1) / 2, 64, 256, row_sums<T>, x.data<const T>(),
                in.tensor("sums").data<float>(), rows, int(x.size(1)), x.stride(0));
  });
}
