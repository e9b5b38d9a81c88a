// Runs the CUDA kernels of the conv stem without a GPU: see tests/cuda/shim.py.

#include "harness.h"

#include "conv_stem_plan.h"

int main(int argc, char** argv) {
  const harness::Arguments in(argc, argv);
  const auto& x = in.tensor("x");
  const auto& tokens = in.tensor("tokens");
  conv_stem::Sizes s{};
  s.type = x.dtype == "bfloat16" ? conv_stem::Type::Bf16 : conv_stem::Type::Fp16;
  s.B = int(x.size(0)), s.CIN = int(x.size(1)), s.H = int(x.size(2)), s.W = int(x.size(3));
  s.C = int(tokens.size(2)), s.HO = (s.H + 1) / 2, s.WO = (s.W + 1) / 2;
  const conv_stem::Image image{x.data<void>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  const auto run = [&](auto* kernel, const auto& launch) {
    dev::launch(dim3(launch.grid_x, launch.grid_y, launch.grid_z), launch.threads,
                launch.shared_bytes, kernel, launch.plan);
  };
  const int strip = int(in.integer("strip"));
  if (in.has("weight")) {
    const conv_stem::Forward call{s, image, in.tensor("weight").data<void>(),
                                  in.data_or_null<void>("bias"), tokens.data<void>(),
                                  in.data_or_null<uint8_t>("codes")};
    const auto launch = conv_stem::plan_forward(call, int(in.integer("multiprocessors")), strip);
    conv_stem::with_forward_kernel(call, [&](auto* kernel) { run(kernel, launch); });
  } else {
    const auto& sums = in.tensor("sums");
    const conv_stem::Backward call{s, image, tokens.data<void>(), in.tensor("codes").data<uint8_t>(),
                                   sums.data<float>(), int(sums.size(0))};
    const auto launch = conv_stem::plan_backward(call, strip);
    conv_stem::with_backward_kernel(call, [&](auto* kernel) { run(kernel, launch); });
  }
}
