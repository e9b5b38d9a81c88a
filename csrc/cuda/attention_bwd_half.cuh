// The pieces of attention's backward kernel in bf16 and fp16.

#pragma once

#include "attention_bwd_parts.cuh"
#include "attention_fragments.cuh"

namespace attention::bwd {

// kEmulated of 8 exponentials run on the FMA units.
template <class T, int kWidth, bool kDropout, int kEmulated>
struct Half {
  using Type = T;
  // what the registers hold; a call of dropout's generator serves 64 keys, fewer waste a part
  static constexpr int kKeys = kDropout && kWidth < 16 ? 64 : 32;
  static constexpr int kQueries = (kWidth == 16 ? 128 : 256) / (kDropout ? 2 : 1);
  static constexpr int kKeyTiles = kKeys / 16;
  static constexpr int kPanels = kWidth == 16 ? 2 : 1;  // of 8 channels

  // one warp's strip in shared memory: panels of kQueries rows of 8 elements, then row constants
  static constexpr int kPanel = kQueries * 16;
  static constexpr bool kSpare = kWidth == 4;  // channels 4..7 hold what needs panels elsewhere
  static constexpr int kQHi = 0;  // q * scale * log2(e), rounded; with kSpare also kQLo
  static constexpr int kQLo = kSpare ? kQHi : kQHi + kPanels * kPanel;  // what rounding took
  static constexpr int kQ = kSpare ? kQHi : kQLo + kPanels * kPanel;    // q itself
  static constexpr int kDo = kSpare ? kQHi + kPanel : kQ + kPanels * kPanel;
  static constexpr int kLse = kDo + kPanels * kPanel;  // float4 (a, b, a, b) for queries 2i, 2i+1
  static constexpr int kDelta = kLse + kQueries * 8;   // the same, if not kSpare
  static constexpr int kDeltaPairs = kSpare ? kDelta : kDelta + kQueries * 8;  // 2 x 16 bits
  static constexpr int kStrip = kDeltaPairs + (kDropout ? kQueries * 2 : 0);
  // of a multiprocessor; dropout and wide heads need more than a third of the registers
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocks = 2;
#else
  static constexpr int kBlocks = kDropout || kWidth == 16 ? 2 : 3;
#endif
  // fp16 holds dS only if dO is of a fitting size, which a loss scale or its absence prevent
  static constexpr bool kScaled = std::is_same_v<T, dev::Fp16>;
  // of dK: with kSpare it comes from the scaled q, in two parts; else from q itself
  __device__ static float k_factor(const Plan& plan) {
    return kSpare ? kLn2 : plan.call.in.scale;
  }

  // 2^k that brings the largest |dO| of a head to [1, 2); the lanes of a warp share the queries
  __device__ static float gradient_scale(const Plan& plan, int64_t b, int h) {
    uint32_t most = 0;  // bits of a positive fp16
    for (int i = threadIdx.x % 32; i < plan.call.in.L; i += 32) {
      uint32_t grad[kWidth / 2];
      load_row<T, kWidth>(token<T>(plan.call.grad_o, b, h, i), plan, true, grad);
#pragma unroll
      for (int p = 0; p < kWidth / 2; ++p) {
        most = max(most, max(grad[p] & 0x7fffu, grad[p] >> 16 & 0x7fffu));
      }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) most = max(most, dev::shfl_xor(most, step));
    if (most == 0 || most >= 0x7c00u) return 1;  // nothing to scale, or not finite
    const uint32_t exponent = dev::float_bits(dev::unpack_lo<T>(most)) >> 23;
    return dev::bits_float(254 - exponent << 23);
  }

  // One query's row of a strip, dO times a power of 2; not used: padding, or a query without keys.
  __device__ __forceinline__ static void stage(const Plan& plan, int64_t b, int h, int i, bool used,
                                               float scale, uint32_t strip, int row) {
    const Inputs& in = plan.call.in;
    uint32_t raw[kWidth / 2], grad[kWidth / 2], o[kWidth / 2], hi[kWidth / 2], lo[kWidth / 2];
    load_row<T, kWidth>(token<T>(in.q, b, h, i), plan, used, raw);
    load_row<T, kWidth>(token<T>(plan.call.grad_o, b, h, i), plan, used, grad);
    load_row<T, kWidth>(token<T>(plan.call.o, b, h, i), plan, used, o);
    float delta = 0;
#pragma unroll
    for (int p = 0; p < kWidth / 2; ++p) {
      if constexpr (kScaled) {
        grad[p] = dev::pack<T>(dev::unpack_lo<T>(grad[p]) * scale,
                               dev::unpack_hi<T>(grad[p]) * scale);
      }
      delta = dev::fma(dev::unpack_lo<T>(grad[p]), dev::unpack_lo<T>(o[p]), delta);
      delta = dev::fma(dev::unpack_hi<T>(grad[p]), dev::unpack_hi<T>(o[p]), delta);
      const float x = dev::unpack_lo<T>(raw[p]) * plan.factor;
      const float y = dev::unpack_hi<T>(raw[p]) * plan.factor;
      split_pair<T>(hi[p], lo[p], x, y);
    }
    delta *= used ? inverse_factor(plan, h) : 0;
    if constexpr (kSpare) {
      const float rounded = dev::to_float(dev::from_float<T>(-delta));
      store_panel(strip + kQHi, row, hi[0], hi[1], lo[0], lo[1]);
      const uint32_t parts = dev::pack<T>(rounded, -delta - rounded);  // times the ones beside V
      store_panel(strip + kDo, row, grad[0], grad[1], parts, 0);
    } else {
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        const uint32_t at = strip + p * kPanel, w = 4 * p;
        store_panel(at + kQHi, row, hi[w], hi[w + 1], hi[w + 2], hi[w + 3]);
        store_panel(at + kQLo, row, lo[w], lo[w + 1], lo[w + 2], lo[w + 3]);
        store_panel(at + kQ, row, raw[w], raw[w + 1], raw[w + 2], raw[w + 3]);
        store_panel(at + kDo, row, grad[w], grad[w + 1], grad[w + 2], grad[w + 3]);
      }
      store_twice(strip + kDelta, row, -delta);
    }
    if constexpr (kDropout) {
      const dev::Shared<T> pairs(strip + kDeltaPairs, kQueries);
      pairs[row] = dev::from_float<T>(-delta);
    }
  }

  // One block's keys and values as left operands of S^T = K Q^T and dP^T = V dO^T, and the keys as
  // right operand of dQ += dS K.
  struct Block : Sums<kKeyTiles, kPanels> {
    static constexpr int kM = kKeyTiles, kN = kPanels;
    static constexpr int kKRegs = kWidth == 4 ? 2 : 4, kVRegs = kWidth == 16 ? 4 : 2;

    uint32_t k[kM][kKRegs], v[kM][kVRegs], k_right[kM][kN][2];
    uint32_t used;  // bit 2m + r: key row 8r of tile m takes part

    // A key that takes no part shows S^T the key `other`, which does (zeros where none does), so
    // that its weights stay finite; zeros in V and in k_right keep them out of dQ, and finish()
    // out of dK and dV.
    __device__ __forceinline__ void load(const Plan& plan, int64_t b, int h, int first, int other) {
      const Inputs& in = plan.call.in;
      const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      used = taking_part<2 * kM>(in, b, first + g);
      const T *k_rows[2 * kM], *v_rows[2 * kM];
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        const int shown = used >> i & 1 ? first + 8 * i + g : max(other, 0);
        k_rows[i] = token<T>(in.k, b, h, shown), v_rows[i] = token<T>(in.v, b, h, shown);
      }
      uint32_t keys[kN][2 * kM], values[kN][2 * kM];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int c = 8 * n + (kSpare ? t % 2 * 2 : 2 * t);
        load_pairs<T>(k_rows, c, plan, keys[n]);
        load_pairs<T>(v_rows, c, plan, values[n]);
      }
      const uint32_t beside = t == 2 ? dev::pack<T>(1, 1) : 0;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i) {
          const int m = i / 2, r = i % 2;
          const bool valid = used >> i & 1;
          k[m][2 * n + r] = other < 0 ? 0 : keys[n][i];
          v[m][2 * n + r] = !valid ? 0 : kSpare && t >= 2 ? beside : values[n][i];
          k_right[m][n][r] = dev::movmatrix(valid ? keys[n][i] : 0);
          if constexpr (kWidth == 8) k[m][r + 2] = opaque(k[m][r]);
        }
    }

    // whether the lane's columns 2t, 2t + 1 of dK and dV are channels
    __device__ static bool holds_channels() { return !kSpare || threadIdx.x % 4 < 2; }
    __device__ float2 value(int m, int n, int r) const {
      const uint32_t pair = v[m][2 * n + r];
      return {dev::unpack_lo<T>(pair), dev::unpack_hi<T>(pair)};
    }
  };

  // P^T and dS^T of 16 keys and 16 queries from the finished products, as left operands.
  __device__ __forceinline__ static void weights_and_ds(
      const float (&s)[2][4], const float (&dp)[2][4], uint32_t (&p)[4], uint32_t (&ds)[4],
      const uint32_t (&dropout)[4], const uint32_t (&delta)[2]) {
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
  __device__ __forceinline__ static void visit(Block& block, const Strip& from, int tile,
                                               const TileBits& random, float (&dq)[kPanels][4]) {
    constexpr int kN = kPanels;
    // right operands: q_b[part] of S^T, o_b of dP^T; transposed ones of dK and dV
    uint32_t q_b[kWidth == 4 ? 1 : kWidth / 8][2][2], o_b[2][2], q_t[kN][2], o_t[kN][2];
    uint32_t x[4];
    if constexpr (kWidth == 4) {
      dev::ldmatrix_x4(x, from.panels(kQHi, kDo, tile));
      q_b[0][0][0] = x[0], q_b[0][1][0] = x[1], o_b[0][0] = x[2], o_b[1][0] = x[3];
    } else if constexpr (kWidth == 8) {
      load_halves(q_b[0], from.halves(kQHi, kQLo, tile));
      uint32_t y[2];
      dev::ldmatrix_x2(y, from.panels(kDo, kDo, tile));
      o_b[0][0] = y[0], o_b[1][0] = y[1];
    } else {
      load_halves(q_b[0], from.halves(kQHi, kQHi + kPanel, tile));
      load_halves(q_b[1], from.halves(kQLo, kQLo + kPanel, tile));
      load_halves(o_b, from.halves(kDo, kDo + kPanel, tile));
    }
    if constexpr (kN == 1) {
      dev::ldmatrix_x4_trans(x, from.panels(kQ, kDo, tile));
      q_t[0][0] = x[0], q_t[0][1] = x[1], o_t[0][0] = x[2], o_t[0][1] = x[3];
    } else {
      dev::ldmatrix_x4_trans(x, from.panels(kQ, kQ + kPanel, tile));
      q_t[0][0] = x[0], q_t[0][1] = x[1], q_t[1][0] = x[2], q_t[1][1] = x[3];
      dev::ldmatrix_x4_trans(x, from.panels(kDo, kDo + kPanel, tile));
      o_t[0][0] = x[0], o_t[0][1] = x[1], o_t[1][0] = x[2], o_t[1][1] = x[3];
    }
    // what is added to S^T and dP^T: the same for rows g and g + 8
    float lse[2][4], delta[2][4] = {};
    uint32_t delta_pairs[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      from.quad(kLse, 2 * tile + n, lse[n]);
      if constexpr (!kSpare) from.quad(kDelta, 2 * tile + n, delta[n]);
      if constexpr (kDropout) delta_pairs[n] = from.pair(kDeltaPairs, 2 * tile + n);
    }
    uint32_t words[4][4];
    if constexpr (kDropout) random.draw<kKeyTiles>(tile, words);

#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
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
      weights_and_ds(s, dp, p, ds, dropout, delta_pairs);
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
};

}  // namespace attention::bwd
