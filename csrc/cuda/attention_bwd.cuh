// Gradient of attention in bf16 and fp16 for heads of up to 16 channels, one pass over the scores.
//
// A warp owns a strip of one head's queries, whose dQ stays in its registers, and walks over blocks
// of kKeys keys. Tiles are S^T = K Q^T (rows are keys): P^T and dS^T leave the tensor cores in the
// layout in which dV += P^T dO and dK += dS^T Q take their left operand; only dQ += dS K needs a
// transposition. A block's dK and dV are complete after one warp if its strip holds all queries.
// Otherwise the warps of a head take turns at a group of blocks and hand the sums on through shared
// memory (through global memory from one round of strips to the next), always in the same order:
// no atomics, equal bits at every run.
//
// With c = head_scale * kept dropout's factor: dS = c P (m (dO V^T) - delta), delta =
// rowsum(dO * O) / c, m = 0 or 1. The factor c is applied to the sums, so c = 0 needs no care.

#pragma once

#include "attention_bwd_parts.cuh"

namespace attention::bwd {

// What an instantiation keeps in registers: the strip's dQ and one block's dK and dV.
template <class T, int kWidth, bool kDropout>
struct Shape {
  // a call of the generator serves 64 keys
  static constexpr int kKeys = kDropout ? 64 : 32;
  static constexpr int kQueries = (kWidth == 16 ? 128 : 256) / (kKeys / 32);
  static constexpr int kKeyTiles = kKeys / 16;
  static constexpr int kQueryTiles = kQueries / 16;
  static constexpr int kPanels = kWidth == 16 ? 2 : 1;  // of 8 channels

  // one warp's strip in shared memory: panels of kQueries rows of 8 elements, then row constants
  static constexpr int kPanel = kQueries * 16;
  static constexpr bool kSpare = kWidth == 4;  // channels 4..7 hold what needs panels elsewhere
  static constexpr int kQHi = 0;             // q * scale * log2(e) rounded; with kSpare also kQLo
  static constexpr int kQLo = kSpare ? kQHi : kQHi + kPanels * kPanel;  // and what rounding took
  static constexpr int kQ = kSpare ? kQHi : kQLo + kPanels * kPanel;     // q itself
  static constexpr int kDo = kSpare ? kQHi + kPanel : kQ + kPanels * kPanel;
  static constexpr int kLse = kDo + kPanels * kPanel;  // float4 (a, b, a, b) for queries 2i, 2i+1
  static constexpr int kDelta = kLse + kQueries * 8;  // the same, if not kSpare
  static constexpr int kDeltaPairs = kSpare ? kDelta : kDelta + kQueries * 8;  // 2 x 16 bits
  static constexpr int kStrip = kDeltaPairs + (kDropout ? kQueries * 2 : 0);
  // sums of dK and dV of one block, handed from warp to warp
  static constexpr int kSums = kKeyTiles * kPanels * 2 * 32 * 16;

  static constexpr int shared_bytes(int warps_per_head) {
    return kWarps * (kStrip + (warps_per_head > 1 ? kSums : 0));
  }
};

// Fill the strips of all the block's warps for the queries from `first` on.
template <class T, int kWidth, bool kDropout>
__device__ void stage_queries(const Plan& plan, int64_t b, int first_head, int first) {
  using Sh = Shape<T, kWidth, kDropout>;
  const Inputs& in = plan.call.in;
  const int heads = kWarps / plan.warps_per_head;
  const int count = plan.warps_per_head * plan.strip;
  for (int item = threadIdx.x; item < heads * count; item += kThreads) {
    // neighbouring threads take neighbouring heads: they share the sectors of a token
    const int head = item % heads, query = item / heads, h = first_head + head;
    const int i = first + query, row = query % plan.strip;
    const uint32_t strip = (head * plan.warps_per_head + query / plan.strip) * Sh::kStrip;
    const bool valid = h < in.H && i < in.L;
    const float lse = valid ? plan.call.lse[(b * in.H + h) * in.L + i] : -INFINITY;
    const bool used = lse != -INFINITY;  // neither padding nor a query without keys
    uint32_t raw[kWidth / 2], grad[kWidth / 2], o[kWidth / 2], hi[kWidth / 2], lo[kWidth / 2];
    load_row<T, kWidth>(token<T>(in.q, b, h, i), plan, used, raw);
    load_row<T, kWidth>(token<T>(plan.call.grad_o, b, h, i), plan, used, grad);
    load_row<T, kWidth>(token<T>(plan.call.o, b, h, i), plan, used, o);
    float delta = 0;
#pragma unroll
    for (int p = 0; p < kWidth / 2; ++p) {
      delta = dev::fma(dev::unpack_lo<T>(grad[p]), dev::unpack_lo<T>(o[p]), delta);
      delta = dev::fma(dev::unpack_hi<T>(grad[p]), dev::unpack_hi<T>(o[p]), delta);
      const float x = dev::unpack_lo<T>(raw[p]) * plan.factor;
      const float y = dev::unpack_hi<T>(raw[p]) * plan.factor;
      hi[p] = dev::pack<T>(x, y);
      lo[p] = dev::pack<T>(x - dev::unpack_lo<T>(hi[p]), y - dev::unpack_hi<T>(hi[p]));
    }
    delta *= used ? inverse_factor(plan, h) : 0;
    if constexpr (Sh::kSpare) {
      const float rounded = dev::to_float(dev::from_float<T>(-delta));
      store_panel(strip + Sh::kQHi, row, hi[0], hi[1], lo[0], lo[1]);
      store_panel(strip + Sh::kDo, row, grad[0], grad[1],
                  dev::pack<T>(rounded, -delta - rounded), 0);
    } else {
#pragma unroll
      for (int p = 0; p < Sh::kPanels; ++p) {
        const uint32_t at = strip + p * Sh::kPanel, w = 4 * p;
        store_panel(at + Sh::kQHi, row, hi[w], hi[w + 1], hi[w + 2], hi[w + 3]);
        store_panel(at + Sh::kQLo, row, lo[w], lo[w + 1], lo[w + 2], lo[w + 3]);
        store_panel(at + Sh::kQ, row, raw[w], raw[w + 1], raw[w + 2], raw[w + 3]);
        store_panel(at + Sh::kDo, row, grad[w], grad[w + 1], grad[w + 2], grad[w + 3]);
      }
      store_twice(strip + Sh::kDelta, row, -delta);
    }
    store_twice(strip + Sh::kLse, row, used ? -lse * kLog2e : -INFINITY);
    if constexpr (kDropout) {
      const dev::Shared<T> pairs(strip + Sh::kDeltaPairs, Sh::kQueries);
      pairs[row] = dev::from_float<T>(-delta);
    }
  }
}

// One block's keys and values as left operands of S^T = K Q^T and dP^T = V dO^T, and the keys as
// right operand of dQ += dS K.
template <class T, int kWidth, bool kDropout>
struct Block {
  using Sh = Shape<T, kWidth, kDropout>;
  static constexpr int kM = Sh::kKeyTiles, kN = Sh::kPanels;
  static constexpr int kKRegs = kWidth == 4 ? 2 : 4, kVRegs = kWidth == 16 ? 4 : 2;

  uint32_t k[kM][kKRegs], v[kM][kVRegs], k_right[kM][kN][2];
  uint32_t used;  // bit 2m + r: key row 8r of tile m takes part
  float dk[kM][kN][4], dv[kM][kN][4];

  // A key that takes no part shows S^T the key `other`, which takes part, so that its weights stay
  // finite; zeros in V and in k_right keep them out of dQ, and finish() out of dK and dV.
  __device__ __forceinline__ void load(const Plan& plan, int64_t b, int h, int first,
                                       int other) {
    const Inputs& in = plan.call.in;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    used = 0;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = first + 16 * m + 8 * r + g;
        const bool valid = key < in.S && takes_part(in, b, key);
        used |= uint32_t(valid) << (2 * m + r);
        const int shown = valid ? key : other;
        const T *k_row = token<T>(in.k, b, h, shown), *v_row = token<T>(in.v, b, h, shown);
        if constexpr (kWidth == 4) {
          k[m][r] = load_pair(k_row, t % 2 * 2, plan, true);
          const uint32_t ones = dev::pack<T>(1, 1);
          v[m][r] = t < 2 ? load_pair(v_row, 2 * t, plan, valid) : t == 2 && valid ? ones : 0;
        } else {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            k[m][2 * n + r] = load_pair(k_row, 2 * t + 8 * n, plan, true);
            v[m][2 * n + r] = load_pair(v_row, 2 * t + 8 * n, plan, valid);
          }
        }
#pragma unroll
        for (int n = 0; n < kN; ++n)
          k_right[m][n][r] = dev::movmatrix(valid ? k[m][2 * n + r] : 0);
        if constexpr (kWidth == 8) k[m][r + 2] = opaque(k[m][r]);
      }
    }
  }

  // sums of another warp, or of an earlier round
  template <class Memory>
  __device__ __forceinline__ void load_sums(const Memory& memory) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        memory.load(2 * (m * kN + n), dk[m][n]);
        memory.load(2 * (m * kN + n) + 1, dv[m][n]);
      }
  }

  template <class Memory>
  __device__ __forceinline__ void store_sums(const Memory& memory) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        memory.store(2 * (m * kN + n), dk[m][n]);
        memory.store(2 * (m * kN + n) + 1, dv[m][n]);
      }
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[m][n][e] = dv[m][n][e] = 0;
  }

  // write dK and dV; the thread's share of sum(dV * V) before head_scale and dropout's factor
  __device__ __forceinline__ float finish(const Plan& plan, int64_t b, int h, int first,
                                          float factor, bool stored) {
    const Inputs& in = plan.call.in;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // with kSpare dK came from the scaled q, in two parts; else from q itself
    const float k_factor = Sh::kSpare ? 1 / kLog2e : in.scale;
    float weight = 0;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = first + 16 * m + 8 * r + g;
          const float mine = used >> (2 * m + r) & 1 ? factor : 0;
          float dk_lo = dk[m][n][2 * r], dk_hi = dk[m][n][2 * r + 1];
          const float dv_lo = dv[m][n][2 * r], dv_hi = dv[m][n][2 * r + 1];
          if constexpr (Sh::kSpare) {
            dk_lo += dev::shfl_xor(dk_lo, 2);
            dk_hi += dev::shfl_xor(dk_hi, 2);
          }
          const uint32_t value = v[m][2 * n + r];
          if (!Sh::kSpare || t < 2) {
            weight = dev::fma(dv_lo, dev::unpack_lo<T>(value), weight);
            weight = dev::fma(dv_hi, dev::unpack_hi<T>(value), weight);
            const bool valid = stored && key < in.S;
            const int c = 2 * t + 8 * n;
            store_pair(token<T>(plan.call.grad_k, b, h, key), c, plan, valid,
                       mine * k_factor * dk_lo, mine * k_factor * dk_hi);
            store_pair(token<T>(plan.call.grad_v, b, h, key), c, plan, valid, mine * dv_lo,
                       mine * dv_hi);
          }
        }
    return weight;
  }
};

// P^T and dS^T of 16 keys and 16 queries from the finished products, as left operands.
template <class T, int kWidth, bool kDropout, int kEmulated>
__device__ __forceinline__ void weights_and_ds(const float (&s)[2][4], const float (&dp)[2][4],
                                               uint32_t (&p)[4], uint32_t (&ds)[4],
                                               const uint32_t (&dropout)[4],
                                               const uint32_t (&delta)[2]) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // an emulated exponential keeps the special-function unit free; spread them over the tile
      const float x = exp2(s[n][2 * r], 2 * n + r < kEmulated);
      const float y = exp2(s[n][2 * r + 1], 2 * n + r + 4 < kEmulated);
      p[2 * n + r] = dev::pack<T>(x, y);
      ds[2 * n + r] = dev::pack<T>(dp[n][2 * r], dp[n][2 * r + 1]);
    }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if constexpr (kDropout) ds[e] = (ds[e] & dropout[e]) | (delta[e / 2] & ~dropout[e]);
    ds[e] = multiply_pairs<T>(p[e], ds[e]);
    if constexpr (kDropout) p[e] &= dropout[e];
  }
}

// All of one block against 16 queries of the strip.
template <class T, int kWidth, bool kDropout, int kEmulated>
__device__ __forceinline__ void visit_tile(Block<T, kWidth, kDropout>& block, const Strip& from,
                                           int tile, const TileBits& random,
                                           float (&dq)[kWidth == 16 ? 2 : 1][4]) {
  using Sh = Shape<T, kWidth, kDropout>;
  constexpr int kN = Sh::kPanels;
  // right operands: q_b[part] of S^T, o_b of dP^T; transposed ones of dK and dV
  uint32_t q_b[kWidth == 4 ? 1 : kWidth / 8][2][2], o_b[2][2], q_t[kN][2], o_t[kN][2];
  uint32_t x[4];
  if constexpr (kWidth == 4) {
    dev::ldmatrix_x4(x, from.panels(Sh::kQHi, Sh::kDo, tile));
    q_b[0][0][0] = x[0], q_b[0][1][0] = x[1], o_b[0][0] = x[2], o_b[1][0] = x[3];
  } else if constexpr (kWidth == 8) {
    load_halves(q_b[0], from.halves(Sh::kQHi, Sh::kQLo, tile));
    uint32_t y[2];
    dev::ldmatrix_x2(y, from.panels(Sh::kDo, Sh::kDo, tile));
    o_b[0][0] = y[0], o_b[1][0] = y[1];
  } else {
    load_halves(q_b[0], from.halves(Sh::kQHi, Sh::kQHi + Sh::kPanel, tile));
    load_halves(q_b[1], from.halves(Sh::kQLo, Sh::kQLo + Sh::kPanel, tile));
    load_halves(o_b, from.halves(Sh::kDo, Sh::kDo + Sh::kPanel, tile));
  }
  if constexpr (kN == 1) {
    dev::ldmatrix_x4_trans(x, from.panels(Sh::kQ, Sh::kDo, tile));
    q_t[0][0] = x[0], q_t[0][1] = x[1], o_t[0][0] = x[2], o_t[0][1] = x[3];
  } else {
    dev::ldmatrix_x4_trans(x, from.panels(Sh::kQ, Sh::kQ + Sh::kPanel, tile));
    q_t[0][0] = x[0], q_t[0][1] = x[1], q_t[1][0] = x[2], q_t[1][1] = x[3];
    dev::ldmatrix_x4_trans(x, from.panels(Sh::kDo, Sh::kDo + Sh::kPanel, tile));
    o_t[0][0] = x[0], o_t[0][1] = x[1], o_t[1][0] = x[2], o_t[1][1] = x[3];
  }
  // what is added to S^T and dP^T: the same for rows g and g + 8
  float lse[2][4], delta[2][4] = {};
  uint32_t delta_pairs[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    from.quad(Sh::kLse, 2 * tile + n, lse[n]);
    if constexpr (!Sh::kSpare) from.quad(Sh::kDelta, 2 * tile + n, delta[n]);
    if constexpr (kDropout) delta_pairs[n] = from.pair(Sh::kDeltaPairs, 2 * tile + n);
  }
  uint32_t words[4][4];
  if constexpr (kDropout) random.draw(tile, words);

#pragma unroll
  for (int m = 0; m < Sh::kKeyTiles; ++m) {
    float s[2][4], dp[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if constexpr (kWidth == 4) {
        dev::mma_16x8x8<T>(s[n], block.k[m], q_b[0][n][0], lse[n]);
        dev::mma_16x8x8<T>(dp[n], block.v[m], o_b[n][0], delta[n]);
      } else {
        dev::mma_16x8x16<T>(s[n], block.k[m], q_b[0][n], lse[n]);
        if constexpr (kWidth == 8) {
          dev::mma_16x8x8<T>(dp[n], block.v[m], o_b[n][0], delta[n]);
        } else {
          dev::mma_16x8x16<T>(s[n], block.k[m], q_b[1][n], s[n]);
          dev::mma_16x8x16<T>(dp[n], block.v[m], o_b[n], delta[n]);
        }
      }
    }
    uint32_t p[4], ds[4], dropout[4] = {0, 0, 0, 0};
    if constexpr (kDropout) TileBits::masks(words, m, dropout);
    weights_and_ds<T, kWidth, kDropout, kEmulated>(s, dp, p, ds,
                                                dropout, delta_pairs);
    // queries 0..7 and 8..15 of the tile, transposed: the left operand of dS K
    const uint32_t turned[4] = {dev::movmatrix(ds[0]), dev::movmatrix(ds[2]),
                                dev::movmatrix(ds[1]), dev::movmatrix(ds[3])};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      dev::mma_16x8x16<T>(block.dv[m][n], p, o_t[n], block.dv[m][n]);
      dev::mma_16x8x16<T>(block.dk[m][n], ds, q_t[n], block.dk[m][n]);
      dev::mma_16x8x16<T>(dq[n], turned, block.k_right[m][n], dq[n]);
    }
  }
}

template <class T, int kWidth, bool kDropout, int kEmulated>
__global__ void __launch_bounds__(kThreads, kWidth == 16 ? 2 : 3)
    attention_backward(const Plan plan) {
  using Sh = Shape<T, kWidth, kDropout>;
  const Inputs& in = plan.call.in;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, W = plan.warps_per_head;
  const int groups = (in.H + kWarps / W - 1) / (kWarps / W);
  const int64_t b = blockIdx.x / groups;
  const int first_head = blockIdx.x % groups * (kWarps / W);
  // Control flow is the same in all warps: one without a head of its own repeats the last head,
  // one without queries or keys adds zeros, and neither stores.
  const int part = warp % W, own = first_head + warp / W, h = min(own, in.H - 1);
  const bool stored = own < in.H;
  const Strip from(warp * Sh::kStrip);
  const int blocks = (in.S + Sh::kKeys - 1) / Sh::kKeys;
  const int other = first_key(in, b);
  const float factor = output_factor(plan, h), q_factor = factor * in.scale;
  float weight = 0;

  for (int first = 0; first < in.L; first += W * plan.strip) {
    if (first > 0) dev::block_barrier();
    stage_queries<T, kWidth, kDropout>(plan, b, first_head, first);
    dev::block_barrier();
    const bool last_round = first + W * plan.strip >= in.L;
    const int first_query = first + part * plan.strip;
    const int tiles = (min(plan.strip, in.L - first) + 15) / 16;
    float dq[Sh::kQueryTiles][Sh::kPanels][4];
#pragma unroll
    for (int i = 0; i < Sh::kQueryTiles; ++i)
#pragma unroll
      for (int n = 0; n < Sh::kPanels; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[i][n][e] = 0;

    for (int group = 0; group < blocks; group += W) {
      for (int turn = 0; turn < W; ++turn) {
        const int in_group = (part + turn) % W, index = group + in_group;
        const SharedSums sums{
            uint32_t(kWarps * Sh::kStrip + (warp - part + in_group) * Sh::kSums)};
        const GlobalSums saved{plan.call.sums + ((b * in.H + h) * blocks + index) * (Sh::kSums / 4),
                               stored && index < blocks};
        Block<T, kWidth, kDropout> block;
        block.load(plan, b, h, index * Sh::kKeys, other);
        if (turn > 0) {
          block.load_sums(sums);
        } else if (first > 0) {
          block.load_sums(saved);
        } else {
          block.clear_sums();
        }
        const TileBits random(in, b * in.H + h, first_query, index);
#pragma unroll
        for (int i = 0; i < Sh::kQueryTiles; ++i) {
          if (i >= tiles) break;
          visit_tile<T, kWidth, kDropout, kEmulated>(block, from, i, random, dq[i]);
        }
        if (turn + 1 < W) {
          block.store_sums(sums);
        } else if (!last_round) {
          block.store_sums(saved);
        } else {
          weight += block.finish(plan, b, h, index * Sh::kKeys, factor, stored);
        }
        if (W > 1) dev::block_barrier();
      }
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < Sh::kQueryTiles; ++i)
#pragma unroll
      for (int n = 0; n < Sh::kPanels; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int in_strip = 16 * i + 8 * r + g, query = first_query + in_strip;
          const bool valid = stored && in_strip < plan.strip && query < in.L;
          if (!Sh::kSpare || t < 2)
            store_pair(token<T>(plan.call.grad_q, b, h, query), 2 * t + 8 * n, plan, valid,
                       dq[i][n][2 * r] * q_factor, dq[i][n][2 * r + 1] * q_factor);
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
      plan.call.grad_head_scale[b * in.H + h] = sum * plan.keep_factor;
    }
  }
}

}  // namespace attention::bwd
