// How one forward call is laid over the device: heads of a block, keys in shared memory, alignment.

#pragma once

#include "attention_fwd.cuh"

namespace attention {

struct ForwardLaunch {
  ForwardPlan plan;
  int channels;  // kD of the kernel
  uint32_t grid_x, grid_y, shared_bytes;
};

// three blocks of it fit a multiprocessor of sm_90, one any that the kernels run on
constexpr uint32_t kForwardShared = 72 << 10;

template <class T, int kD>
uint32_t forward_head_bytes(int D, int keys) {
  return 4 * Layout<T, kD>::head_words(D, (keys + kGroup - 1) / kGroup);
}

inline uint32_t forward_head_bytes(Type type, int channels, int D, int keys) {
  const auto bytes = [&](auto zero) {
    using T = decltype(zero);
    if (channels == 4) return forward_head_bytes<T, 4>(D, keys);
    if (channels == 8) return forward_head_bytes<T, 8>(D, keys);
    return forward_head_bytes<T, 16>(D, keys);
  };
  return type == Type::Fp32 ? bytes(0.f) : bytes(dev::Bf16{});
}

template <class Pointer>
bool rows_aligned(const Rows<Pointer>& rows, int size, int bytes) {
  const int64_t all = int64_t(reinterpret_cast<uintptr_t>(rows.data)) | rows.image * size |
                      rows.head * size | rows.row * size;
  return all % bytes == 0;
}

// multiprocessors: of the device; keys: at most so many in shared memory, for tests
inline ForwardLaunch plan_forward(const Forward& call, int multiprocessors, int keys = 1 << 30) {
  const Inputs& in = call.in;
  const int size = in.type == Type::Fp32 ? 4 : 2;
  const int channels = in.D <= 4 ? 4 : in.D <= 8 ? 8 : 16;
  ForwardLaunch launch{};
  ForwardPlan& plan = launch.plan;
  launch.channels = channels;
  plan.call = call;
  plan.factor = in.scale * kLog2e;
  plan.keep_factor = in.seed == nullptr ? 1.f : in.keep_factor;
  plan.whole_rows = in.D == channels && rows_aligned(in.k, size, size * in.D < 16 ? 8 : 16) &&
                    rows_aligned(in.v, size, size * in.D < 16 ? 8 : 16);
  plan.query_pairs = in.D % 2 == 0 && rows_aligned(in.q, size, 2 * size);
  plan.output_pairs = in.D % 2 == 0 && rows_aligned(call.o, size, 2 * size);

  keys = (in.S < keys ? in.S : keys) + 63 & ~63;
  const auto head_bytes = [&] { return forward_head_bytes(in.type, channels, in.D, keys); };
  while (keys > 64 && head_bytes() > kForwardShared) keys -= 64;
  plan.chunk = keys;

  // neighbouring heads share the 32-byte sectors of memory; more blocks fill the device
  const int wanted = 4 * multiprocessors;
  int shift = 0;
  const auto blocks = [&] { return int64_t(in.B) * ((in.H + (1 << shift) - 1) >> shift); };
  while (shift < 2 && in.D * size << shift < 32 && in.H > 1 << shift) ++shift;
  while (shift > 0 && (head_bytes() << shift > kForwardShared || blocks() < wanted)) --shift;
  plan.heads_shift = shift;
  const int warps = kForwardWarps >> shift, tiles = (in.L + kTile - 1) / kTile;
  const int turns = (tiles + warps - 1) / warps;  // of a block that takes all queries of its heads
  int64_t parts = (wanted + blocks() - 1) / blocks();
  if (parts > turns) parts = turns;
  plan.tiles = int((turns + parts - 1) / parts) * warps;
  launch.grid_x = uint32_t(blocks());
  launch.grid_y = uint32_t((tiles + plan.tiles - 1) / plan.tiles);
  launch.shared_bytes = head_bytes() << shift;
  plan.shared_words = int32_t(launch.shared_bytes / 4);
  return launch;
}

// exponentials of 8 on the FMA units: they have room where dropout takes none, and 16-bit weights
// need no more accuracy
template <class T, bool kDropout>
constexpr int kForwardEmulated = kSingle<T> || kDropout ? 0 : 2;

// calls f(kernel) with the kernel of a launch
template <class F>
auto with_forward_kernel(const ForwardLaunch& launch, F&& f) {
  const auto of_channels = [&](auto zero, auto dropout) {
    using T = decltype(zero);
    constexpr bool kDropout = decltype(dropout)::value;
    constexpr int kEmulated = kForwardEmulated<T, kDropout>;
    if (launch.channels == 4) return f(attention_forward<T, 4, kDropout, kEmulated>);
    if (launch.channels == 8) return f(attention_forward<T, 8, kDropout, kEmulated>);
    return f(attention_forward<T, 16, kDropout, kEmulated>);
  };
  const Inputs& in = launch.plan.call.in;
  const auto of_type = [&](auto dropout) {
    if (in.type == Type::Bf16) return of_channels(dev::Bf16{}, dropout);
    if (in.type == Type::Fp16) return of_channels(dev::Fp16{}, dropout);
    return of_channels(0.f, dropout);
  };
  return in.seed == nullptr ? of_type(std::false_type{}) : of_type(std::true_type{});
}

}  // namespace attention
