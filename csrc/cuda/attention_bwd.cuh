// Gradient of attention for heads of up to 16 channels, in one pass over the scores.
//
// A warp owns a strip of one head's queries, whose dQ stays in its registers, and walks over blocks
// of keys. Tiles are S^T = K Q^T (rows are keys): P^T and dS^T leave the tensor cores in the
// layout in which dV += P^T dO and dK += dS^T Q take their left operand; only dQ += dS K needs a
// transposition. A block's dK and dV are complete after one warp if its strip holds all queries.
// Otherwise the warps of a head take turns at a group of blocks and hand the sums on through shared
// memory (through global memory from one round of strips to the next), always in the same order:
// no atomics, equal bits at every run.
//
// All of it is linear in dO, so fp16 takes dO times a power of two per head and gives it back last.
//
// With c = head_scale * kept dropout's factor: dS = c P (m (dO V^T) - delta), delta =
// rowsum(dO * O) / c, m = 0 or 1. The factor c is applied to the sums, so c = 0 needs no care.
//
// A Method (Half, Single) is the arithmetic: what a strip and a block hold, and visit(), which
// takes a block past 16 queries.

#pragma once

#include "attention_bwd_fp32.cuh"
#include "attention_bwd_half.cuh"

namespace attention::bwd {

// one block's dK and dV, handed from warp to warp
template <class Method>
constexpr int kSumBytes = Method::kKeyTiles * Method::kPanels * 2 * 32 * 16;

template <class Method>
__host__ __device__ constexpr int shared_bytes(int warps_per_head) {
  return kWarps * (Method::kStrip + (warps_per_head > 1 ? kSumBytes<Method> : 0) +
                   (Method::kScaled ? int(sizeof(float)) : 0));
}

// dO's powers of two, one per warp, where Method::kScaled
template <class Method>
__device__ __forceinline__ dev::Shared<float> gradient_scales(int warps_per_head) {
  return {uint32_t(shared_bytes<Method>(warps_per_head)) - kWarps * 4, kWarps};
}

// Fill the strips of all the block's warps for the queries from `first` on.
template <class Method>
__device__ void stage_queries(const Plan& plan, int64_t b, int first_head, int first) {
  const Inputs& in = plan.call.in;
  const int heads = kWarps / plan.warps_per_head;
  const int count = plan.warps_per_head * plan.strip;
  const auto scales = gradient_scales<Method>(plan.warps_per_head);
  for (int item = threadIdx.x; item < heads * count; item += kThreads) {
    // neighbouring threads take neighbouring heads: they share the sectors of a token
    const int head = item % heads, query = item / heads, h = first_head + head;
    const int i = first + query, row = query % plan.strip;
    const uint32_t strip = (head * plan.warps_per_head + query / plan.strip) * Method::kStrip;
    const bool valid = h < in.H && i < in.L;
    const float lse = valid ? plan.call.lse[(b * in.H + h) * in.L + i] : -INFINITY;
    const bool used = lse != -INFINITY;  // neither padding nor a query without keys
    const float scale = Method::kScaled ? scales[head * plan.warps_per_head] : 1.f;
    Method::stage(plan, b, h, i, used, scale, strip, row);
    store_twice(strip + Method::kLse, row, used ? -lse * kLog2e : -INFINITY);
  }
}

// Write a block's dK and dV; the thread's share of sum(dV * V) before head_scale and dropout's
// factor.
template <class Method>
__device__ __forceinline__ float finish(const typename Method::Block& block, const Plan& plan,
                                        int64_t b, int h, int first, float factor, bool stored) {
  using T = typename Method::Type;
  const int S = plan.call.in.S, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const float k_factor = factor * Method::k_factor(plan);
  float weight = 0;
#pragma unroll
  for (int m = 0; m < Method::kKeyTiles; ++m)
#pragma unroll
    for (int n = 0; n < Method::kPanels; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = first + 16 * m + 8 * r + g, c = 2 * t + 8 * n;
        float2 dk = {block.dk[m][n][2 * r], block.dk[m][n][2 * r + 1]};
        float2 dv = {block.dv[m][n][2 * r], block.dv[m][n][2 * r + 1]};
        if constexpr (Method::kSpare) {
          dk.x += dev::shfl_xor(dk.x, 2);
          dk.y += dev::shfl_xor(dk.y, 2);
        }
        if (!(block.used >> (2 * m + r) & 1)) dk = dv = {0, 0};
        const bool valid = stored && key < S && Method::Block::holds_channels();
        const float2 value = block.value(m, n, r);
        if (valid) weight = dev::fma(dv.y, value.y, dev::fma(dv.x, value.x, weight));
        store_pair(token<T>(plan.call.grad_k, b, h, key), c, plan, valid, k_factor * dk.x,
                   k_factor * dk.y);
        store_pair(token<T>(plan.call.grad_v, b, h, key), c, plan, valid, factor * dv.x,
                   factor * dv.y);
      }
  return weight;
}

template <class Method>
__global__ void __launch_bounds__(kThreads, Method::kBlocks) attention_backward(const Plan plan) {
  using T = typename Method::Type;
  constexpr int kQueryTiles = Method::kQueries / 16, kPanels = Method::kPanels;
  const Inputs& in = plan.call.in;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, W = plan.warps_per_head;
  const int groups = (in.H + kWarps / W - 1) / (kWarps / W);
  const int64_t b = blockIdx.x / groups;
  const int first_head = blockIdx.x % groups * (kWarps / W);
  // Control flow is the same in all warps: one without a head of its own repeats the last head,
  // one without queries or keys adds zeros, and neither stores.
  const int part = warp % W, own = first_head + warp / W, h = min(own, in.H - 1);
  const bool stored = own < in.H;
  const Strip from(warp * Method::kStrip);
  const int blocks = (in.S + Method::kKeys - 1) / Method::kKeys;
  const int other = first_key(in, b);
  float inverse = 1;  // of what dO was multiplied by
  if constexpr (Method::kScaled) {
    const float scale = Method::gradient_scale(plan, b, h);
    if (lane == 0) gradient_scales<Method>(W)[warp] = scale;
    dev::block_barrier();
    inverse = 1 / scale;
  }
  const float factor = output_factor(plan, h) * inverse, q_factor = factor * in.scale;
  float weight = 0;

  for (int first = 0; first < in.L; first += W * plan.strip) {
    if (first > 0) dev::block_barrier();
    stage_queries<Method>(plan, b, first_head, first);
    dev::block_barrier();
    const bool last_round = first + W * plan.strip >= in.L;
    const int first_query = first + part * plan.strip;
    const int tiles = (min(plan.strip, in.L - first) + 15) / 16;
    float dq[kQueryTiles][kPanels][4];
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i)
#pragma unroll
      for (int n = 0; n < kPanels; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[i][n][e] = 0;

    for (int group = 0; group < blocks; group += W) {
      for (int turn = 0; turn < W; ++turn) {
        const int in_group = (part + turn) % W, index = group + in_group;
        const SharedSums sums{
            uint32_t(kWarps * Method::kStrip + (warp - part + in_group) * kSumBytes<Method>)};
        const int64_t place = (b * in.H + h) * blocks + index;
        const GlobalSums saved{plan.call.sums + place * (kSumBytes<Method> / 4),
                               stored && index < blocks};
        typename Method::Block block;
        block.load(plan, b, h, index * Method::kKeys, other);
        if (turn > 0) {
          block.load_sums(sums);
        } else if (first > 0) {
          block.load_sums(saved);
        } else {
          block.clear_sums();
        }
        const TileBits random(in, b * in.H + h, first_query, index * Method::kKeys);
#pragma unroll
        for (int i = 0; i < kQueryTiles; ++i) {
          if (i >= tiles) break;
          Method::visit(block, from, i, random, dq[i]);
        }
        if (turn + 1 < W) {
          block.store_sums(sums);
        } else if (!last_round) {
          block.store_sums(saved);
        } else {
          weight += finish<Method>(block, plan, b, h, index * Method::kKeys, factor, stored);
        }
        if (W > 1) dev::block_barrier();
      }
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kQueryTiles; ++i)
#pragma unroll
      for (int n = 0; n < kPanels; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int in_strip = 16 * i + 8 * r + g, query = first_query + in_strip;
          const bool valid = stored && in_strip < plan.strip && query < in.L;
          store_pair(token<T>(plan.call.grad_q, b, h, query), 2 * t + 8 * n, plan,
                     valid && Method::Block::holds_channels(), dq[i][n][2 * r] * q_factor,
                     dq[i][n][2 * r + 1] * q_factor);
        }
  }
  if (plan.call.grad_head_scale) {
    for (int mask = 16; mask > 0; mask /= 2) weight += dev::shfl_xor(weight, mask);
    const dev::Shared<float> weights(0, kWarps);
    dev::block_barrier();
    if (lane == 0) weights[warp] = weight;
    dev::block_barrier();
    if (lane == 0 && part == 0 && stored) {
      float sum = 0;
      for (int i = 0; i < W; ++i) sum += weights[warp + i];
      plan.call.grad_head_scale[b * in.H + h] = sum * plan.keep_factor * inverse;
    }
  }
}

}  // namespace attention::bwd
