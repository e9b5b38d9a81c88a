// Launches of the forward kernels of attention.

#include <cuda_runtime.h>

#include "attention_fwd_plan.h"

namespace attention {

int launch_forward(const Forward& call, void* stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const ForwardLaunch launch = plan_forward(call, multiprocessors);
  return with_forward_kernel(launch, [&](auto* kernel) -> int {
    const auto all = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, all, kForwardShared);
    if (error != cudaSuccess) return error;
    const dim3 grid(launch.grid_x, launch.grid_y);
    kernel<<<grid, kForwardWarps * 32, launch.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
        launch.plan);
    return cudaGetLastError();
  });
}

}  // namespace attention
