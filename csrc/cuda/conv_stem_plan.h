// How the calls of the conv stem are laid over the device.

#pragma once

#include "conv_stem_bwd.cuh"
#include "conv_stem_fwd.cuh"

namespace conv_stem {

// what a block may have without asking for more; images up to kMaxWidth fit
constexpr uint32_t kShared = 48 << 10;

template <class Plan>
struct Launch {
  Plan plan;
  uint32_t grid_x, grid_y, grid_z, threads, shared_bytes;
};

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// strip: at most so many rows of tokens in one block, for tests
inline Launch<ForwardPlan> plan_forward(const Forward& call, int multiprocessors,
                                        int strip = 1 << 20) {
  const Sizes& s = call.sizes;
  Launch<ForwardPlan> launch{};
  ForwardPlan& plan = launch.plan;
  plan.call = call;
  plan.pitch = tiles_of(s) * kTile + 2;
  plan.strip = s.HO < strip ? s.HO : strip;
  while (plan.strip > 1 && forward_shared_bytes(plan) > kShared) --plan.strip;
  const int groups = divide_up(s.C, kChannels), warps = groups < kWarps ? groups : kWarps;
  launch.grid_z = divide_up(groups, warps);
  // three blocks a multiprocessor; every strip computes one row of sums again
  const int wanted = 3 * multiprocessors;
  const auto blocks = [&] { return int64_t(s.B) * launch.grid_z * divide_up(s.HO, plan.strip); };
  while (plan.strip > 2 && blocks() < wanted) plan.strip = divide_up(plan.strip, 2);
  launch.grid_y = divide_up(s.HO, plan.strip);
  const int side_by_side = divide_up(wanted, int(launch.grid_y * launch.grid_z));
  launch.grid_x = divide_up(s.B, divide_up(s.B, side_by_side));
  launch.threads = warps * 32;
  launch.shared_bytes = forward_shared_bytes(plan);
  return launch;
}

inline Launch<BackwardPlan> plan_backward(const Backward& call, int strip = 1 << 20) {
  const Sizes& s = call.sizes;
  Launch<BackwardPlan> launch{};
  BackwardPlan& plan = launch.plan;
  plan.call = call;
  plan.pitch = tiles_of(s) * kTile / 2 + 1;
  plan.strip = s.HO < strip ? s.HO : strip;
  while (plan.strip > 1 && backward_shared_bytes(plan) > kShared) --plan.strip;
  const int groups = divide_up(s.C, kGradientChannels), warps = groups < kWarps ? groups : kWarps;
  launch.grid_x = call.shares;
  launch.grid_y = divide_up(groups, warps);
  launch.grid_z = 1;
  launch.threads = warps * 32;
  launch.shared_bytes = backward_shared_bytes(plan);
  return launch;
}

// calls f(kernel) with the kernel of a call
template <class F>
auto with_forward_kernel(const Forward& call, F&& f) {
  const bool codes = call.codes != nullptr;
  if (call.sizes.type == Type::Bf16) {
    return codes ? f(conv_stem_forward<dev::Bf16, true>) : f(conv_stem_forward<dev::Bf16, false>);
  }
  return codes ? f(conv_stem_forward<dev::Fp16, true>) : f(conv_stem_forward<dev::Fp16, false>);
}

template <class F>
auto with_backward_kernel(const Backward& call, F&& f) {
  if (call.sizes.type == Type::Bf16) return f(conv_stem_dweight<dev::Bf16>);
  return f(conv_stem_dweight<dev::Fp16>);
}

}  // namespace conv_stem
