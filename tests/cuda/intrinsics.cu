// intrinsics.cuh on a GPU, as a C function for ctypes; pointers to the device's memory.

#include "intrinsics.cuh"

extern "C" int run_intrinsics(int op, const uint32_t* words, uint32_t* results, int blocks) {
  intrinsics::run<<<blocks, 32, 1024>>>(op, words, results);
  const cudaError_t launched = cudaGetLastError();
  return int(launched != cudaSuccess ? launched : cudaDeviceSynchronize());
}
