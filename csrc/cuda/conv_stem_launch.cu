// Launches of the kernels of the conv stem.

#include <cuda_runtime.h>

#include "conv_stem_plan.h"

namespace conv_stem {

namespace {

template <class Plan>
int start(void (*kernel)(Plan), const Launch<Plan>& launch, void* stream) {
  const dim3 grid(launch.grid_x, launch.grid_y, launch.grid_z);
  kernel<<<grid, launch.threads, launch.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      launch.plan);
  return cudaGetLastError();
}

}  // namespace

int launch_forward(const Forward& call, void* stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto launch = plan_forward(call, multiprocessors);
  return with_forward_kernel(call, [&](auto* kernel) { return start(kernel, launch, stream); });
}

int launch_backward(const Backward& call, void* stream) {
  const auto launch = plan_backward(call);
  return with_backward_kernel(call, [&](auto* kernel) { return start(kernel, launch, stream); });
}

}  // namespace conv_stem
