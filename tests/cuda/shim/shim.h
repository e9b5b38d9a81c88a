// CUDA C++ and the names of csrc/cuda/device.cuh for any C++20 compiler, to run kernels where
// there is no GPU, under AddressSanitizer and UndefinedBehaviorSanitizer.
//
// A harness is a C++ file that includes harness.h and kernel templates (.cuh), takes its arguments
// from a file and calls dev::launch; tests/cuda/shim.py builds and runs it with tensors. See
// example_harness.cpp and test_example.py.
//
// What this does not have does not compile (__syncthreads, __shared__, __shfl_sync, atomics): the
// names of device.cuh are the only way. Differences that a kernel author meets:
//   * s[i] of a Shared is a proxy: write `float x = s[i]`, not `auto x = s[i]`;
//   * s.ptr(i, count) goes to ldmatrix and cp_async alone; vectors by load_shared / store_shared;
//   * blocks run one after the other; every block starts with unwritten shared memory;
//   * local variables without a value hold the byte 0xfe.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

// clang-format off
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// clang-format on

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;

template <class T>
T __ldg(const T* p) {
  return *p;
}

#include "collectives.h"
#include "numbers.h"
#include "shared.h"

namespace dev {

// run a kernel over a grid; shared_bytes of dynamic shared memory per block
template <class... P, class... A>
void launch(dim3 grid, dim3 block, uint32_t shared_bytes, void (*kernel)(P...), A&&... arguments) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % host::kWarp) {
    host::fail("a block of %u threads is not 32 to 1024 threads in whole warps", threads);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    host::fail("a grid of %u x %u x %u blocks cannot be launched", grid.x, grid.y, grid.z);
  }
  if (shared_bytes > 232448) {
    host::fail("%u bytes of shared memory are more than the 232448 of a block", shared_bytes);
  }
  gridDim = grid;
  blockDim = block;
  host::Scheduler& scheduler = host::Scheduler::get();
  const std::function<void()> body = [&] {
    kernel(arguments...);
    host::Copies::of_current().check_finished();
  };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        host::SharedMemory::get().reset(shared_bytes);
        host::Copies::reset(threads);
        scheduler.run(int(threads), body);
      }
    }
  }
}

}  // namespace dev
