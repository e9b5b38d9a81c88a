// Issue rates of the instructions that the attention kernels are made of, alone and mixed.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -o pipes benchmarks/pipes.cu; ./pipes
//
// Prints JSON: warp instructions per clock and scheduler (an SM has four), and the clock in MHz.
// 16 warps on every SM repeat a step; each instruction of a step has registers of its own, so only
// instructions called "chained" wait for their own last result.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr int CHAINS = 8;    // independent register sets of an instruction
constexpr int THREADS = 512;  // 4 warps a scheduler
constexpr int ROUNDS = 2000;

// r is written, key tells the chains apart (equal instructions would be merged), in is shared
struct Registers {
  uint32_t r[CHAINS][4], key[CHAINS][2], in[4], address;
  uint64_t sum[CHAINS];
};

#define OP(NAME, ...)                               \
  struct NAME : Registers {                         \
    __device__ __forceinline__ void step(int c) {   \
      asm volatile(__VA_ARGS__);                    \
    }                                               \
  };
#define ONE "+r"(r[c][0])
#define IN "r"(in[0])

OP(Ex2, "ex2.approx.ftz.f32 %0, %0;" : ONE)
OP(Ffma, "fma.rn.f32 %0, %0, %1, %1;" : ONE : IN)
OP(Fmnmx, "max.f32 %0, %0, %1;" : ONE : IN)
OP(PackBf16, "cvt.rn.bf16x2.f32 %0, %0, %1;" : ONE : IN)
OP(PackF16, "cvt.rn.f16x2.f32 %0, %0, %1;" : ONE : IN)
OP(Prmt, "prmt.b32 %0, %0, %1, %1;" : ONE : IN)
OP(Lop3, "lop3.b32 %0, %0, %1, %1, 0x96;" : ONE : IN)
OP(Shf, "shf.l.wrap.b32 %0, %0, %1, %1;" : ONE : IN)
OP(Hfma2, "fma.rn.f16x2 %0, %0, %1, %1;" : ONE : IN)
OP(Movmatrix, "movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : ONE)
OP(Shfl, "shfl.sync.bfly.b32 %0, %0, 1, 31, 0xffffffff;" : ONE)

OP(ImadWide, "{.reg .b32 lo, hi; mov.b64 {lo, hi}, %0; mul.wide.u32 %0, hi, %1;}"
   : "+l"(sum[c]) : IN)

#define ALL "=r"(r[c][0]), "=r"(r[c][1]), "=r"(r[c][2]), "=r"(r[c][3])
OP(Ldmatrix, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
   : ALL : "r"(address + key[c][0] % 256 * 16))
OP(LdmatrixTrans, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
   : ALL : "r"(address + key[c][0] % 256 * 16))

// separate C: the four results do not feed the next product
#define QUAD "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
OP(Mma8, "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%8},"
   " {%4, %5, %6, %7};" : ALL : QUAD, "r"(key[c][0]))
OP(Mma16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3},"
   " {%4, %5, %6, %7}, {%8, %9}, {%4, %5, %6, %7};"
   : ALL : QUAD, "r"(key[c][0]), "r"(key[c][1]))
OP(MmaTf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3},"
   " {%4, %5, %6, %7}, {%8, %9}, {%4, %5, %6, %7};"
   : ALL : QUAD, "r"(key[c][0]), "r"(key[c][1]))
#define ACCUMULATE "+r"(r[c][0]), "+r"(r[c][1]), "+r"(r[c][2]), "+r"(r[c][3])
OP(Mma16Chained, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3},"
   " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
   : ACCUMULATE : QUAD, "r"(key[c][0]), "r"(key[c][1]))

// REPEAT instructions of one kind in every step
template <class T, int REPEAT>
struct Times : T {
  static constexpr int COUNT = REPEAT;
};

template <class... Parts>
__global__ void __launch_bounds__(THREADS) run(uint32_t seed, uint32_t* sink, int64_t* clocks) {
  __shared__ uint4 table[256];
  if (threadIdx.x < 256) table[threadIdx.x] = make_uint4(seed, seed, seed, seed);
  __syncthreads();
  struct All : Parts... {
  } all;
  auto each = [&](auto& part) {
    for (int c = 0; c < CHAINS; ++c) {
      for (int i = 0; i < 4; ++i) part.r[c][i] = part.in[i] = seed * i + threadIdx.x + c;
      for (int i = 0; i < 2; ++i) part.key[c][i] = seed * c + threadIdx.x + i;
      part.sum[c] = seed;
    }
    part.address = static_cast<uint32_t>(__cvta_generic_to_shared(table));
  };
  (each(static_cast<Parts&>(all)), ...);
  auto step = [&](auto& part, int count) {
#pragma unroll
    for (int i = 0; i < count; ++i) part.step(i % CHAINS);
  };
  __syncthreads();
  const int64_t begin = clock64();
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) (step(static_cast<Parts&>(all), Parts::COUNT), ...);
  __syncthreads();
  const int64_t end = clock64();
  uint32_t sum = table[threadIdx.x % 256].x;
  auto add = [&](auto& part) {
    for (int c = 0; c < CHAINS; ++c) {
      for (int i = 0; i < 4; ++i) sum ^= part.r[c][i];
      sum ^= uint32_t(part.sum[c]);
    }
  };
  (add(static_cast<Parts&>(all)), ...);
  sink[blockIdx.x * THREADS + threadIdx.x] = sum;
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "error: %s\n", cudaGetErrorString(error));
  exit(1);
}

template <class... Parts>
void measure(const char* name, bool last = false) {
  int sms = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  uint32_t* sink;
  int64_t* clocks;
  check(cudaMalloc(&sink, sizeof(uint32_t) * sms * THREADS));
  check(cudaMalloc(&clocks, sizeof(int64_t) * sms));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  run<Parts...><<<sms, THREADS>>>(1, sink, clocks);
  constexpr int LAUNCHES = 20;  // long enough that the clock settles under this load
  check(cudaEventRecord(begin));
  for (int i = 0; i < LAUNCHES; ++i) run<Parts...><<<sms, THREADS>>>(1, sink, clocks);
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end));
  std::vector<int64_t> host(sms);
  check(cudaMemcpy(host.data(), clocks, sizeof(int64_t) * sms, cudaMemcpyDeviceToHost));
  double mean = 0;
  for (int64_t c : host) mean += double(c) / sms;
  const double steps = double(ROUNDS) * THREADS / 32 / 4;  // of one scheduler
  const int instructions = (Parts::COUNT + ...);
  printf("  {\"name\": \"%s\", \"per_clock\": %.4f, \"clocks_per_step\": %.3f, \"mhz\": %.0f}%s\n",
         name, steps * instructions / mean, mean / steps, mean * LAUNCHES / ms / 1e3,
         last ? "" : ",");
  fflush(stdout);
  check(cudaFree(sink));
  check(cudaFree(clocks));
}

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  printf("{\"device\": \"%s\", \"pipes\": [\n", device.name);
  measure<Times<Ex2, 8>>("MUFU.EX2");
  measure<Times<Ffma, 8>>("FFMA");
  measure<Times<Fmnmx, 8>>("FMNMX");
  measure<Times<PackBf16, 8>>("F2FP.BF16");
  measure<Times<PackF16, 8>>("F2FP.F16");
  measure<Times<Prmt, 8>>("PRMT");
  measure<Times<Lop3, 8>>("LOP3");
  measure<Times<Shf, 8>>("SHF");
  measure<Times<Hfma2, 8>>("HFMA2");
  measure<Times<ImadWide, 8>>("IMAD.WIDE");
  measure<Times<Movmatrix, 8>>("MOVM");
  measure<Times<Shfl, 8>>("SHFL");
  measure<Times<Ldmatrix, 8>>("LDSM.x4");
  measure<Times<LdmatrixTrans, 8>>("LDSM.x4.trans");
  measure<Times<Mma8, 8>>("HMMA.1688");
  measure<Times<Mma16, 8>>("HMMA.16816");
  measure<Times<MmaTf32, 8>>("HMMA.1688.TF32");
  measure<Times<Mma16Chained, 8>>("HMMA.16816, 8 chains");
  measure<Times<Mma16Chained, 1>>("HMMA.16816, 1 chain");
  measure<Times<Ex2, 8>, Times<Ffma, 8>>("8 MUFU + 8 FFMA");
  measure<Times<Ex2, 8>, Times<Ffma, 32>>("8 MUFU + 32 FFMA");
  measure<Times<Ex2, 8>, Times<PackBf16, 4>>("8 MUFU + 4 F2FP");
  measure<Times<Ex2, 8>, Times<Prmt, 4>>("8 MUFU + 4 PRMT");
  measure<Times<Ex2, 8>, Times<Mma8, 2>, Times<Mma16, 1>>("8 MUFU + 3 HMMA");
  measure<Times<Ex2, 8>, Times<PackBf16, 4>, Times<Mma8, 2>, Times<Mma16, 1>>(
      "forward tile: 8 MUFU + 4 F2FP + 2 HMMA.1688 + HMMA.16816");
  measure<Times<Ex2, 8>, Times<PackBf16, 8>, Times<Ffma, 16>, Times<Movmatrix, 4>, Times<Mma8, 4>,
          Times<Mma16, 3>>("backward tile: 8 MUFU + 8 F2FP + 16 FFMA + 4 MOVM + 7 HMMA", true);
  printf("]}\n");
  return 0;
}
