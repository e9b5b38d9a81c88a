// How many warp instructions per clock a scheduler of this GPU sustains: of the instructions that
// the attention kernels consist of, alone and in their mixtures. One JSON object per line.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

namespace {

constexpr int kRegisters = 8;  // independent chains of a warp
constexpr int kRounds = 256;

struct State {
  uint32_t x[kRegisters];
  float sums[kRegisters][4];
  uint32_t operand;
  uint32_t shared;  // address
};

#define ONE_REGISTER(NAME, LABEL, TEXT)                                   \
  struct NAME {                                                           \
    static constexpr const char* name = LABEL;                            \
    static __device__ __forceinline__ void run(State& s, int i) {         \
      asm volatile(TEXT : "+r"(s.x[i]) : "r"(s.operand));                 \
    }                                                                     \
  }

ONE_REGISTER(Ex2, "ex2", "{.reg .f32 a; mov.b32 a, %0; ex2.approx.ftz.f32 a, a; mov.b32 %0, a;}");
ONE_REGISTER(Ffma, "ffma",
             "{.reg .f32 a, b; mov.b32 a, %0; mov.b32 b, %1; fma.rn.f32 a, a, b, b; "
             "mov.b32 %0, a;}");
ONE_REGISTER(Fadd, "fadd",
             "{.reg .f32 a, b; mov.b32 a, %0; mov.b32 b, %1; add.f32 a, a, b; mov.b32 %0, a;}");
ONE_REGISTER(Fmax, "fmax",
             "{.reg .f32 a, b; mov.b32 a, %0; mov.b32 b, %1; max.f32 a, a, b; mov.b32 %0, a;}");
ONE_REGISTER(PackBf16, "pack_bf16",
             "{.reg .f32 a, b; mov.b32 a, %0; mov.b32 b, %1; cvt.rn.bf16x2.f32 %0, a, b;}");
ONE_REGISTER(ToTf32, "to_tf32", "{.reg .f32 a; mov.b32 a, %0; cvt.rna.tf32.f32 %0, a;}");
ONE_REGISTER(Prmt, "prmt", "prmt.b32 %0, %0, %1, 0x5410;");
ONE_REGISTER(Lop3, "lop3", "lop3.b32 %0, %0, %1, %0, 0x6a;");
ONE_REGISTER(Hfma2, "hfma2", "fma.rn.f16x2 %0, %0, %1, %1;");
ONE_REGISTER(ImadWide, "imad_wide",
             "{.reg .u64 a; mul.wide.u32 a, %0, %1; .reg .u32 b; mov.b64 {b, %0}, a;}");
ONE_REGISTER(Shfl, "shfl", "shfl.sync.idx.b32 %0, %0, %0, 0x1f, 0xffffffff;");
ONE_REGISTER(Movmatrix, "movmatrix", "movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;");

struct Iadd {
  static constexpr const char* name = "iadd";
  static __device__ __forceinline__ void run(State& s, int i) {
    asm volatile("add.u32 %0, %0, %1;" : "+r"(s.x[i]) : "r"(s.x[(i + 3) % kRegisters]));
  }
};

// loads: what they load, which is zero, is added to the next address, so that none is left out
struct Lds128 {
  static constexpr const char* name = "lds_128 (and 3 iadd)";
  static __device__ __forceinline__ void run(State& s, int i) {
    uint32_t a, b, c, d;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(s.shared + s.x[i]));
    s.x[i] = a + b + c + d;
  }
};

struct LdmatrixX4 {
  static constexpr const char* name = "ldmatrix_x4 (and iadd)";
  static __device__ __forceinline__ void run(State& s, int i) {
    asm volatile("{.reg .u32 a, b, c; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, a, b, c}, "
                 "[%1];}"
                 : "=r"(s.x[i])
                 : "r"(s.shared + s.x[i]));
  }
};

struct LdmatrixX4Trans {
  static constexpr const char* name = "ldmatrix_x4_trans (and iadd)";
  static __device__ __forceinline__ void run(State& s, int i) {
    asm volatile("{.reg .u32 a, b, c; ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 "
                 "{%0, a, b, c}, [%1];}"
                 : "=r"(s.x[i])
                 : "r"(s.shared + s.x[i]));
  }
};

// kSeparate: the addend is zero and not the last result, as in the product of queries and keys; the
// last result is an operand instead
template <int kDepth, bool kSeparate>
struct Mma {
  static constexpr const char* name =
      kDepth == 8 ? (kSeparate ? "mma_16x8x8_separate" : "mma_16x8x8")
                  : (kSeparate ? "mma_16x8x16_separate" : "mma_16x8x16");
  static __device__ __forceinline__ void run(State& s, int i) {
    float(&d)[4] = s.sums[i];
    const uint32_t a = kSeparate ? __float_as_uint(d[0]) : s.operand;
    const float c[4] = {kSeparate ? 0.f : d[0], kSeparate ? 0.f : d[1], kSeparate ? 0.f : d[2],
                        kSeparate ? 0.f : d[3]};
    if constexpr (kDepth == 8) {
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%5,%5}, "
                   "{%4}, {%6,%7,%8,%9};"
                   : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                   : "r"(a), "r"(s.operand), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    } else {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                   "{%5,%5,%5,%5}, {%4,%5}, {%6,%7,%8,%9};"
                   : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                   : "r"(a), "r"(s.operand), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
  }
};

template <class Op, int kCount>
struct Part {
  using Operation = Op;
  static constexpr int count = kCount;
};

template <class Op>
constexpr bool kIsLoad = std::is_same_v<Op, Lds128> || std::is_same_v<Op, LdmatrixX4> ||
                         std::is_same_v<Op, LdmatrixX4Trans>;

// step `step` of kSteps of a mixture: each part's instructions are spread evenly
template <int kSteps, class P>
__device__ __forceinline__ void run_part(State& s, int step) {
  const int from = step * P::count / kSteps, to = (step + 1) * P::count / kSteps;
#pragma unroll
  for (int i = from; i < to; ++i) P::Operation::run(s, i % kRegisters);
}

template <class... P>
__global__ void __launch_bounds__(1024)
    pipes(uint32_t operand, bool loads, uint32_t* out, long long* clocks) {
  __shared__ __align__(128) uint32_t memory[1024];
  memory[threadIdx.x] = 0;
  __syncthreads();
  State s;
  s.operand = operand;
  s.shared = uint32_t(__cvta_generic_to_shared(memory)) + threadIdx.x % 32 * 16;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    s.x[i] = loads ? 0 : operand + threadIdx.x + i;
#pragma unroll
    for (float& sum : s.sums[i]) sum = 0.f;
  }
  const long long begin = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    constexpr int kSteps = 16;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) (run_part<kSteps, P>(s, step), ...);
  }
  __syncthreads();
  const long long end = clock64();
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    all ^= s.x[i];
#pragma unroll
    for (float sum : s.sums[i]) all ^= __float_as_uint(sum);
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = all;
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "error: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <class... P>
void measure() {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  uint32_t* out;
  long long* clocks;
  check(cudaMalloc(&out, sizeof(*out) * 1024 * multiprocessors));
  check(cudaMallocManaged(&clocks, sizeof(*clocks) * multiprocessors));
  const int instructions = (P::count + ...);
  constexpr bool kLoads = (kIsLoad<typename P::Operation> || ...);
  std::printf("{\"mix\": \"");
  const char* between = "";
  ((std::printf("%s%d %s", between, P::count, P::Operation::name), between = " + "), ...);
  std::printf("\"");
  for (int warps : {1, 4, 8}) {  // of a scheduler
    for (int repeat = 0; repeat < 3; ++repeat) {
      pipes<P...><<<multiprocessors, warps * 128>>>(0x3f803f80u, kLoads, out, clocks);
      check(cudaGetLastError());
      check(cudaDeviceSynchronize());
    }
    const double clocks_per_round = double(clocks[0]) / kRounds / warps;
    std::printf(", \"per_clock_%d_warps\": %.4f, \"clocks_of_mix_%d_warps\": %.2f", warps,
                instructions / clocks_per_round, warps, clocks_per_round);
  }
  std::printf("}\n");
  std::fflush(stdout);
  check(cudaFree(out));
  check(cudaFree(clocks));
}

template <class Op>
void measure_alone() {
  measure<Part<Op, 64>>();
}

template <class... Op>
void measure_each() {
  (measure_alone<Op>(), ...);
}

}  // namespace

int main() {
  using Qk = Mma<8, true>;
  using Pv = Mma<16, false>;
  measure_each<Ex2, Ffma, Fadd, Fmax, PackBf16, ToTf32, Prmt, Lop3, Iadd, Hfma2, ImadWide, Shfl,
               Movmatrix, Lds128, LdmatrixX4, LdmatrixX4Trans, Mma<8, false>, Qk, Pv,
               Mma<16, true>>();
  measure<Part<Ex2, 16>, Part<Ffma, 64>>();
  measure<Part<Ex2, 32>, Part<PackBf16, 16>>();
  measure<Part<Ex2, 32>, Part<Prmt, 16>>();
  measure<Part<Ex2, 32>, Part<Qk, 8>, Part<Pv, 4>>();
  // 16 queries and 64 keys of the forward kernel: all exponentials on their unit, then 1, 2 and 3
  // of 8 as polynomials
  measure<Part<Ex2, 32>, Part<PackBf16, 16>, Part<Qk, 8>, Part<Pv, 4>>();
  measure<Part<Ex2, 28>, Part<PackBf16, 16>, Part<Qk, 8>, Part<Pv, 4>, Part<Ffma, 28>,
          Part<Fmax, 4>>();
  measure<Part<Ex2, 24>, Part<PackBf16, 16>, Part<Qk, 8>, Part<Pv, 4>, Part<Ffma, 56>,
          Part<Fmax, 8>>();
  measure<Part<Ex2, 20>, Part<PackBf16, 16>, Part<Qk, 8>, Part<Pv, 4>, Part<Ffma, 84>,
          Part<Fmax, 12>>();
  // dropout's random bits
  measure<Part<ImadWide, 40>, Part<Lop3, 96>, Part<Iadd, 16>>();
}
