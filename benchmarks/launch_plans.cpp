// How the training shapes of benchmarks/static.py are laid over the device: one line of JSON each.
// Compiled like the harnesses of tests/cuda/shim.py: the plans are host code and need no GPU.

#include <cstdio>
#include <cstdlib>

#include "attention_bwd_plan.h"
#include "attention_fwd_plan.h"
#include "conv_stem_plan.h"

namespace {

// an address that is aligned to everything; nothing is read
alignas(256) unsigned char memory[256];

attention::Inputs inputs(attention::Type type, int B, int H, int N, int D, bool dropout) {
  const int64_t row = 3 * H * D;  // q, k and v beside one another, as a projection leaves them
  const attention::InputRows rows{memory, N * row, D, row};
  attention::Inputs in{};
  in.q = in.k = in.v = rows;
  in.seed = dropout ? reinterpret_cast<const int64_t*>(memory) : nullptr;
  in.scale = in.keep_factor = 1;
  in.type = type;
  in.B = B, in.H = H, in.L = in.S = N, in.D = D;
  return in;
}

void print(const char* kernel, const char* type, int D, bool dropout, long blocks, int threads,
           uint32_t shared) {
  std::printf("{\"kernel\": \"%s\", \"dtype\": \"%s\", \"head_dim\": %d, \"dropout\": %s, "
              "\"blocks\": %ld, \"threads\": %d, \"shared\": %u}\n",
              kernel, type, D, dropout ? "true" : "false", blocks, threads, shared);
}

void attention_plans(int multiprocessors, int B, int N, int channels) {
  using attention::Type;
  const char* const names[] = {"bf16", "fp16", "fp32"};
  for (const Type type : {Type::Bf16, Type::Fp16, Type::Fp32})
    for (const int D : {1, 2, 4, 8, 16})
      for (const bool dropout : {false, true}) {
        const auto in = inputs(type, B, channels / D, N, D, dropout);
        const attention::OutputRows out{memory, int64_t(N) * channels, D, channels};
        const auto forward = attention::plan_forward({in, out, nullptr}, multiprocessors);
        print("attention_forward", names[int(type)], D, dropout,
              long(forward.grid_x) * forward.grid_y, attention::kForwardWarps * 32,
              forward.shared_bytes);
        attention::Backward call{};
        call.in = in;
        call.o = call.grad_o = {memory, int64_t(N) * channels, D, channels};
        call.grad_q = call.grad_k = call.grad_v = {memory, in.q.image, in.q.head, in.q.row};
        const auto backward = attention::bwd::plan_backward(call, multiprocessors);
        print("attention_backward", names[int(type)], D, dropout, backward.grid,
              attention::bwd::kThreads, backward.shared_bytes);
      }
}

void conv_stem_plans(int multiprocessors, int B, int C, int pixels) {
  using conv_stem::Type;
  const int side = (pixels + 1) / 2;
  for (const Type type : {Type::Bf16, Type::Fp16}) {
    const char* const name = type == Type::Bf16 ? "bf16" : "fp16";
    const conv_stem::Sizes sizes{type, B, 3, pixels, pixels, C, side, side};
    for (const bool codes : {false, true}) {
      conv_stem::Forward call{};
      call.sizes = sizes;
      call.codes = codes ? memory : nullptr;
      const auto plan = conv_stem::plan_forward(call, multiprocessors);
      print(codes ? "conv_stem_forward, codes" : "conv_stem_forward", name, 0, false,
            long(plan.grid_x) * plan.grid_y * plan.grid_z, int(plan.threads), plan.shared_bytes);
    }
    conv_stem::Backward call{};
    call.sizes = sizes;
    call.shares = multiprocessors;
    const auto plan = conv_stem::plan_backward(call);
    print("conv_stem_dweight", name, 0, false, long(plan.grid_x) * plan.grid_y, int(plan.threads),
          plan.shared_bytes);
  }
}

}  // namespace

// multiprocessors, images, tokens and channels of attention; images of the conv stem
int main(int argc, char** argv) {
  if (argc != 6) dev::host::fail("usage: %s MULTIPROCESSORS B N C IMAGES", argv[0]);
  const auto number = [&](int i) { return std::atoi(argv[i]); };
  attention_plans(number(1), number(2), number(3), number(4));
  conv_stem_plans(number(1), number(5), number(4), 32);
}
