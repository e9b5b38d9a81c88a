// How one backward call is laid over the device: warps of a head, queries of a warp, alignment.

#pragma once

#include "attention_bwd.cuh"

namespace attention::bwd {

// exponentials of 8 on the FMA units, so that issuing takes as long as the unit for the others;
// none where dropout's bits or the products of wide heads take longer
template <int kWidth, bool kDropout>
constexpr int kEmulatedShare = kDropout ? 0 : kWidth == 4 ? 2 : kWidth == 8 ? 1 : 0;

struct Launch {
  Plan plan;
  uint32_t grid, shared_bytes;
  int64_t sums;  // bytes of Backward::sums
};

// calls f(method, kernel) with the kernel of a call
template <class F>
auto with_kernel(const Inputs& in, F&& f) {
  const auto run = [&](auto method) { return f(method, attention_backward<decltype(method)>); };
  const auto of_dropout = [&](auto dropout) {
    constexpr bool kDropout = decltype(dropout)::value;
    const auto half = [&](auto zero) {
      using T = decltype(zero);
      if (in.D <= 4) return run(Half<T, 4, kDropout, kEmulatedShare<4, kDropout>>{});
      if (in.D <= 8) return run(Half<T, 8, kDropout, kEmulatedShare<8, kDropout>>{});
      return run(Half<T, 16, kDropout, kEmulatedShare<16, kDropout>>{});
    };
    if (in.type == Type::Bf16) return half(dev::Bf16{});
    if (in.type == Type::Fp16) return half(dev::Fp16{});
    return in.D <= 8 ? run(Single<8, kDropout>{}) : run(Single<16, kDropout>{});
  };
  return in.seed == nullptr ? of_dropout(std::false_type{}) : of_dropout(std::true_type{});
}

// whether 32 bits hold the distance of any two tokens of a head, in elements
inline bool offsets_fit(const Backward& call) {
  const Inputs& in = call.in;
  const auto fit = [](const auto& rows, int tokens) {
    const int64_t stride = rows.row < 0 ? -rows.row : rows.row;
    return stride * tokens <= INT32_MAX;
  };
  return fit(in.q, in.L) && fit(call.o, in.L) && fit(call.grad_o, in.L) &&
         fit(call.grad_q, in.L) && fit(in.k, in.S) && fit(in.v, in.S) &&
         fit(call.grad_k, in.S) && fit(call.grad_v, in.S);
}

// elements that every row's start is aligned to, at most 8
inline int access_of(const Backward& call) {
  const Inputs& in = call.in;
  const int size = in.type == Type::Fp32 ? 4 : 2;
  int64_t all = in.D;
  const auto add = [&](const auto& rows) {
    const int64_t start = int64_t(reinterpret_cast<uintptr_t>(rows.data)) / size;
    all |= start | rows.image | rows.head | rows.row;
  };
  add(in.q), add(in.k), add(in.v), add(call.o), add(call.grad_o);
  add(call.grad_q), add(call.grad_k), add(call.grad_v);
  int access = 8;
  while (all % access) access /= 2;
  return access;
}

// multiprocessors: of the device; queries: at most so many in a warp's strip, for tests
inline Launch plan_backward(const Backward& call, int multiprocessors, int queries = 1 << 30) {
  const Inputs& in = call.in;
  return with_kernel(in, [&](auto method, auto*) {
    using Method = decltype(method);
    const int longest = queries < Method::kQueries ? queries : Method::kQueries;
    Launch launch{};
    Plan& plan = launch.plan;
    plan.call = call;
    plan.access = access_of(call);
    const double factor = in.scale * 1.4426950408889634;
    plan.factor = float(factor);
    plan.factor_rest = float(factor - plan.factor);
    plan.keep_factor = in.seed == nullptr ? 1.f : in.keep_factor;
    // one warp where it can hold all queries, more where too few heads would leave the device idle
    int warps = 1;
    while (warps < kWarps && (in.L > warps * longest ||
                              (int64_t(in.B) * in.H * warps < 8 * multiprocessors &&
                               in.L > 32 * warps)))
      warps *= 2;
    plan.warps_per_head = warps;
    const int rounds = (in.L + warps * longest - 1) / (warps * longest);
    plan.strip = ((in.L + rounds * warps - 1) / (rounds * warps) + 15) & ~15;
    const int heads = kWarps / warps, blocks = (in.S + Method::kKeys - 1) / Method::kKeys;
    launch.grid = uint32_t(int64_t(in.B) * ((in.H + heads - 1) / heads));
    launch.shared_bytes = shared_bytes<Method>(warps);
    launch.sums = rounds == 1 ? 0 : int64_t(in.B) * in.H * blocks * kSumBytes<Method>;
    return launch;
  });
}

}  // namespace attention::bwd
