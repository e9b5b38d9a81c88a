// Launches of the backward kernels of attention.

#include <cuda_runtime.h>

#include "attention_bwd_plan.h"

namespace attention {

int64_t backward_sums(const Backward& call) {
  return bwd::plan_backward(call, 1).sums;  // more warps of a head need not more
}

int launch_backward(const Backward& call, void* stream) {
  if (!bwd::offsets_fit(call)) return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const bwd::Launch launch = bwd::plan_backward(call, multiprocessors);
  if (launch.sums > 0 && call.sums == nullptr) return cudaErrorInvalidValue;
  return bwd::with_kernel(call.in, [&](auto, auto* kernel) -> int {
    const auto all = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, all, int(launch.shared_bytes));
    if (error != cudaSuccess) return error;
    kernel<<<launch.grid, bwd::kThreads, launch.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
        launch.plan);
    return cudaGetLastError();
  });
}

}  // namespace attention
