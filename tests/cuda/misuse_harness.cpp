// Kernels with one mistake each, and their correct counterparts.

#include <map>

#include "harness.h"

using dev::Shared;

namespace {

using Kernel = void (*)(const float*, float*);

int thread() { return int(threadIdx.x); }
int lane() { return int(threadIdx.x) % 32; }

// ---- right ----

void exchange_in_block(const float* x, float* y) {
  Shared<float> s(0, 64);
  for (int round = 0; round < 3; ++round) {
    s[thread()] = x[thread()];
    dev::block_barrier();
    y[thread()] = s[63 - thread()];
    dev::block_barrier();
  }
}
void exchange_in_warp(const float* x, float* y) {
  Shared<float> s(0, 64);
  s[thread()] = x[thread()];
  dev::warp_barrier();
  y[thread()] = s[thread() ^ 7];
  dev::warp_barrier();
  s[thread()] += 1.f;
}
void halves_of_a_word(const float*, float* y) {
  Shared<uint16_t> s(0, 64);
  s[thread()] = uint16_t(thread());
  y[thread()] = s[thread()];
}
void warps_leave_apart(const float* x, float* y) {
  if (thread() < 32) return;
  y[thread()] = dev::shfl_xor(x[thread()], 1);
}

// ---- races ----

void read_of_another_warp(const float* x, float* y) {
  Shared<float> s(0, 64);
  s[thread()] = x[thread()];
  dev::warp_barrier();
  y[thread()] = s[thread() % 32];
}
void read_of_another_lane(const float* x, float* y) {
  Shared<float> s(0, 64);
  s[thread()] = x[thread()];
  y[thread()] = s[thread() & ~1];
}
void shuffle_is_no_barrier(const float* x, float* y) {
  Shared<float> s(0, 64);
  s[thread()] = x[thread()];
  const float z = dev::shfl_xor(x[thread()], 1);
  y[thread()] = s[thread() & ~1] + z;
}
void write_after_read(const float* x, float* y) {
  Shared<float> s(0, 64);
  s[thread()] = x[thread()];
  dev::block_barrier();
  y[thread()] = s[(thread() + 1) % 64];
  s[thread()] = 0.f;
}
void write_after_reads_by_many(const float* x, float*) {
  Shared<float> s(0, 64);
  if (thread() == 0) s[0] = x[0];
  dev::block_barrier();
  float unused = s[0];
  dev::warp_barrier();
  if (thread() == 40) s[0] = unused;
}
void two_writes(const float* x, float*) {
  Shared<float> s(0, 64);
  s[thread() / 2] = x[thread()];
}
void matrix_without_barrier(const float*, float*) {
  Shared<uint4> s(0, 64);
  s[thread()] = uint4{};
  uint32_t r[4];
  dev::ldmatrix_x4(r, s.ptr(thread()));
}

// ---- bounds, alignment and values ----

void index_beyond_view(const float* x, float*) {
  Shared<float> s(0, 63);
  s[thread()] = x[thread()];
}
void negative_index(const float* x, float*) {
  Shared<float> s(0, 64);
  s[thread() - 1] = x[thread()];
}
void view_beyond_memory(const float*, float*) { Shared<float> s(4, 1024); }
void vector_beyond_view(const float*, float*) {
  Shared<float> s(0, 62);
  dev::store_shared(s, thread() * 4, make_float4(0, 0, 0, 0));
}
void misaligned_vector(const float*, float*) {
  Shared<float> s(0, 512);
  dev::store_shared(s, thread() * 4 + 2, make_float4(0, 0, 0, 0));
}
void misaligned_matrix(const float*, float*) {
  Shared<uint16_t> s(0, 512);
  for (int i = 0; i < 8; ++i) s[thread() * 8 + i] = uint16_t(i);
  dev::warp_barrier();
  uint32_t r[2];
  dev::ldmatrix_x2(r, s.ptr(lane() * 8 + 4));
}
void matrix_beyond_memory(const float*, float*) {
  uint32_t r[4];
  dev::ldmatrix_x4(r, Shared<float>(4096 - 8, 2).ptr(0));
}
void unwritten_read(const float*, float* y) {
  Shared<float> s(0, 64);
  if (thread() != 5) s[thread()] = 1.f;
  y[thread()] = s[thread()];
}
void unwritten_half(const float*, float* y) {
  Shared<uint16_t> half(0, 128);
  Shared<float> s(0, 64);
  half[2 * thread()] = 1;
  y[thread()] = s[thread()];
}
void unwritten_matrix(const float*, float*) {
  Shared<uint16_t> s(0, 512);
  if (lane() != 9) dev::store_shared(s, thread() * 8, uint4{});
  dev::block_barrier();
  uint32_t r[4];
  dev::ldmatrix_x4(r, s.ptr(thread() * 8, 8));
}
void memory_of_the_block_before(const float*, float* y) {
  Shared<float> s(0, 64);
  if (blockIdx.x == 0) s[thread()] = 1.f;
  y[thread()] = s[thread()];
}
void global_read(const float* x, float* y) { y[thread()] = x[thread() + 1]; }
void global_write(const float* x, float* y) { y[thread() - 1] = x[thread()]; }
void misaligned_global(const float* x, float* y) {
  y[thread()] = reinterpret_cast<const float4*>(x + 1)->x;
}
void signed_overflow(const float*, float* y) {
  y[thread()] = float((thread() + 1) * 0x7fffffff);
}
void wide_shift(const float*, float* y) { y[thread()] = float(1u << (thread() + 1)); }

// ---- divergence ----

void half_a_warp(const float* x, float* y) {
  if (lane() < 16) y[thread()] = dev::shfl_xor(x[thread()], 1);
}
void early_return(const float* x, float* y) {
  if (thread() == 63) return;
  y[thread()] = dev::shfl_xor(x[thread()], 1);
}
void two_collectives(const float* x, float* y) {
  if (lane() == 7) {
    y[thread()] = dev::shfl(x[thread()], 0);
  } else {
    y[thread()] = dev::shfl_xor(x[thread()], 1);
  }
}
void barrier_of_one_warp(const float*, float*) {
  if (thread() < 32) dev::block_barrier();
}
void two_barriers(const float*, float*) {
  if (thread() < 32) {
    dev::block_barrier();
  } else {
    dev::block_barrier();
  }
}
void lanes_leave_the_loop(const float* x, float* y) {
  for (int i = 0; i <= lane() / 31; ++i) y[thread()] = dev::shfl_xor(x[thread()], 1);
}

// ---- asynchronous copies ----

void copy_not_awaited(const float* x, float* y) {
  Shared<float> s(0, 64);
  dev::cp_async4(s.ptr(thread()), x + thread(), true);
  dev::cp_async_commit();
  dev::cp_async_wait<1>();
  y[thread()] = s[thread()];
}
void copy_not_committed(const float* x, float* y) {
  Shared<float> s(0, 64);
  dev::cp_async4(s.ptr(thread()), x + thread(), true);
  dev::cp_async_wait<0>();
  y[thread()] = s[thread()];
}
void copy_without_barrier(const float* x, float* y) {
  Shared<float> s(0, 64);
  dev::cp_async4(s.ptr(thread()), x + thread(), true);
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  y[thread()] = s[thread() & ~1];
}
void copy_over_what_is_read(const float* x, float* y) {
  Shared<float> s(0, 64);
  s[thread()] = 1.f;
  dev::block_barrier();
  y[thread()] = s[(thread() + 1) % 64];
  dev::cp_async4(s.ptr(thread()), x + thread(), true);
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
}
void copy_left_behind(const float* x, float*) {
  Shared<float> s(0, 64);
  dev::cp_async4(s.ptr(thread()), x + thread(), true);
  dev::cp_async_commit();
}
void copy_of_a_misaligned_address(const float* x, float*) {
  Shared<float> s(0, 256);
  dev::cp_async16(s.ptr(thread() * 4, 4), x + 1, true);
}
void copy_beyond_the_tensor(const float* x, float*) {
  Shared<float> s(0, 256);
  dev::cp_async16(s.ptr(thread() * 4, 4), x + 4 * thread(), true);
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
}

const std::map<std::string, Kernel> kKernels = {
#define KERNEL(name) {#name, name}
    KERNEL(exchange_in_block), KERNEL(exchange_in_warp), KERNEL(halves_of_a_word),
    KERNEL(warps_leave_apart), KERNEL(read_of_another_warp), KERNEL(read_of_another_lane),
    KERNEL(shuffle_is_no_barrier), KERNEL(write_after_read), KERNEL(write_after_reads_by_many),
    KERNEL(two_writes), KERNEL(matrix_without_barrier), KERNEL(index_beyond_view),
    KERNEL(negative_index), KERNEL(view_beyond_memory), KERNEL(vector_beyond_view),
    KERNEL(misaligned_vector), KERNEL(misaligned_matrix), KERNEL(matrix_beyond_memory),
    KERNEL(unwritten_read), KERNEL(unwritten_half), KERNEL(unwritten_matrix),
    KERNEL(memory_of_the_block_before), KERNEL(global_read), KERNEL(global_write),
    KERNEL(misaligned_global), KERNEL(signed_overflow), KERNEL(wide_shift), KERNEL(half_a_warp),
    KERNEL(early_return), KERNEL(two_collectives), KERNEL(barrier_of_one_warp),
    KERNEL(two_barriers), KERNEL(lanes_leave_the_loop), KERNEL(copy_not_awaited),
    KERNEL(copy_not_committed), KERNEL(copy_without_barrier), KERNEL(copy_over_what_is_read),
    KERNEL(copy_left_behind), KERNEL(copy_of_a_misaligned_address),
    KERNEL(copy_beyond_the_tensor),
};

}  // namespace

int main(int argc, char** argv) {
  const harness::Arguments in(argc, argv);
  dev::launch(unsigned(in.integer("blocks")), unsigned(in.integer("threads")), 4096,
              kKernels.at(in.text("kernel")), in.tensor("x").data<const float>(),
              in.tensor("y").data<float>());
}
