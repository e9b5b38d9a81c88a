// Gradient of attention in bf16 and fp16 for heads of up to 16 channels, one pass over the scores.
//
// A warp owns a strip of one head's queries, whose dQ stays in its registers, and walks over blocks
// of KEYS keys. Tiles are S^T = K Q^T (rows are keys): P^T and dS^T leave the tensor cores in the
// layout in which dV += P^T dO and dK += dS^T Q take their left operand; only dQ += dS K needs a
// transposition. A block's dK and dV are complete after one warp if its strip holds all queries.
// Otherwise WARPS of a head take turns at a group of blocks and hand the sums on through shared
// memory (through global memory from one round of strips to the next), always in the same order:
// no atomics, equal bits at every run.
//
// With c = head_scale * kept dropout's factor: dS = c P (m (dO V^T) - delta), delta =
// rowsum(dO * O) / c, m = 0 or 1. The factor c is applied to the sums, so c = 0 needs no care.

#pragma once

#include "attention_bwd_parts.cuh"

namespace attention_bwd {

// What an instantiation keeps in registers: the strip's dQ and one block's dK and dV.
template <class T, int WIDTH, bool DROPOUT>
struct Shape {
  // a Philox call serves 64 keys; one call per thread and query wants blocks of 64
  static constexpr int KEYS = DROPOUT || KK64 ? 64 : 32;
  static constexpr int QUERIES = (WIDTH == 16 ? 128 : 256) / (KEYS / 32);
  static constexpr int KEY_TILES = KEYS / 16;
  static constexpr int QUERY_TILES = QUERIES / 16;
  static constexpr int PANELS = WIDTH == 16 ? 2 : 1;  // of 8 channels

  // one warp's strip in shared memory: panels of QUERIES rows of 8 elements, then row constants
  static constexpr int PANEL = QUERIES * 16;
  static constexpr bool SPARE = WIDTH == 4;  // channels 4..7 hold what needs panels elsewhere
  static constexpr int Q_HI = 0;             // q * scale * log2(e) rounded; with SPARE also Q_LO
  static constexpr int Q_LO = SPARE ? Q_HI : Q_HI + PANELS * PANEL;  // and what rounding took
  static constexpr int Q = SPARE ? Q_HI : Q_LO + PANELS * PANEL;     // q itself
  static constexpr int DO = SPARE ? Q_HI + PANEL : Q + PANELS * PANEL;
  static constexpr int LSE = DO + PANELS * PANEL;  // float4 (a, b, a, b) for queries 2i, 2i+1
  static constexpr int DELTA = LSE + QUERIES * 8;  // the same, if not SPARE
  static constexpr int DELTA_PAIRS = SPARE ? DELTA : DELTA + QUERIES * 8;  // 2 x 16 bits
  static constexpr int STRIP = DELTA_PAIRS + (DROPOUT ? QUERIES * 2 : 0);
  // sums of dK and dV of one block, handed from warp to warp
  static constexpr int SUMS = KEY_TILES * PANELS * 2 * 32 * 16;

  static constexpr int shared_bytes(int warps_per_head) {
    return WARPS * (STRIP + (warps_per_head > 1 ? SUMS : 0));
  }
};

// Fill the strips of all the block's warps for the queries from `first` on.
template <class T, int WIDTH, bool DROPOUT>
__device__ void stage_queries(const Arguments<T>& a, int64_t b, int first_head, int first) {
  using Sh = Shape<T, WIDTH, DROPOUT>;
  const int heads = WARPS / a.warps_per_head;
  const int count = a.warps_per_head * a.strip;
  for (int item = threadIdx.x; item < heads * count; item += THREADS) {
    // neighbouring threads take neighbouring heads: they share the sectors of a token
    const int head = item % heads, query = item / heads, h = first_head + head;
    const int i = first + query, row = query % a.strip;
    const uint32_t strip = (head * a.warps_per_head + query / a.strip) * Sh::STRIP;
    const bool valid = h < a.H && i < a.L;
    const float lse = valid ? a.lse[(b * a.H + h) * a.L + i] : -INFINITY;
    const bool used = lse != -INFINITY;  // neither padding nor a query without keys
    uint32_t raw[WIDTH / 2], grad[WIDTH / 2], o[WIDTH / 2], hi[WIDTH / 2], lo[WIDTH / 2];
    load_row<T, WIDTH>(a.q.row(b, h, i), a, used, raw);
    load_row<T, WIDTH>(a.d_o.row(b, h, i), a, used, grad);
    load_row<T, WIDTH>(a.o.row(b, h, i), a, used, o);
    float delta = 0;
#pragma unroll
    for (int p = 0; p < WIDTH / 2; ++p) {
      delta = dev::fma(dev::unpack_lo<T>(grad[p]), dev::unpack_lo<T>(o[p]), delta);
      delta = dev::fma(dev::unpack_hi<T>(grad[p]), dev::unpack_hi<T>(o[p]), delta);
      const float x = dev::unpack_lo<T>(raw[p]) * a.scale_log2;
      const float y = dev::unpack_hi<T>(raw[p]) * a.scale_log2;
      hi[p] = dev::pack<T>(x, y);
      lo[p] = dev::pack<T>(x - dev::unpack_lo<T>(hi[p]), y - dev::unpack_hi<T>(hi[p]));
    }
    delta *= used ? inverse_factor(a, h) : 0;
    if constexpr (Sh::SPARE) {
      const float rounded = dev::to_float(dev::from_float<T>(-delta));
      store_panel(strip + Sh::Q_HI, row, hi[0], hi[1], lo[0], lo[1]);
      store_panel(strip + Sh::DO, row, grad[0], grad[1],
                  dev::pack<T>(rounded, -delta - rounded), 0);
    } else {
#pragma unroll
      for (int p = 0; p < Sh::PANELS; ++p) {
        const uint32_t at = strip + p * Sh::PANEL, w = 4 * p;
        store_panel(at + Sh::Q_HI, row, hi[w], hi[w + 1], hi[w + 2], hi[w + 3]);
        store_panel(at + Sh::Q_LO, row, lo[w], lo[w + 1], lo[w + 2], lo[w + 3]);
        store_panel(at + Sh::Q, row, raw[w], raw[w + 1], raw[w + 2], raw[w + 3]);
        store_panel(at + Sh::DO, row, grad[w], grad[w + 1], grad[w + 2], grad[w + 3]);
      }
      store_twice(strip + Sh::DELTA, row, -delta);
    }
    store_twice(strip + Sh::LSE, row, used ? -lse * LOG2E : -INFINITY);
    if constexpr (DROPOUT) {
      const dev::Shared<T> pairs(strip + Sh::DELTA_PAIRS, Sh::QUERIES);
      pairs[row] = dev::from_float<T>(-delta);
    }
  }
}

// One block's keys and values as left operands of S^T = K Q^T and dP^T = V dO^T, and the keys as
// right operand of dQ += dS K.
template <class T, int WIDTH, bool DROPOUT>
struct Block {
  using Sh = Shape<T, WIDTH, DROPOUT>;
  static constexpr int M = Sh::KEY_TILES, N = Sh::PANELS;
  static constexpr int K_REGS = WIDTH == 4 ? 2 : 4, V_REGS = WIDTH == 16 ? 4 : 2;

  uint32_t k[M][K_REGS], v[M][V_REGS], k_right[M][N][2];
  uint32_t used;  // bit 2m + r: key row 8r of tile m takes part
  float dk[M][N][4], dv[M][N][4];

  // A key that takes no part shows S^T the key `other`, which takes part, so that its weights stay
  // finite; zeros in V and in k_right keep them out of dQ, and finish() out of dK and dV.
  __device__ __forceinline__ void load(const Arguments<T>& a, int64_t b, int h, int first,
                                       int other) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    used = 0;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = first + 16 * m + 8 * r + g;
        const bool valid = key < a.S && takes_part(a, b, key);
        used |= uint32_t(valid) << (2 * m + r);
        const T* k_row = a.k.row(b, h, valid ? key : other);
        const T* v_row = a.v.row(b, h, valid ? key : other);
        if constexpr (WIDTH == 4) {
          k[m][r] = load_pair(k_row, t % 2 * 2, a, true);
          const uint32_t ones = dev::pack<T>(1, 1);
          v[m][r] = t < 2 ? load_pair(v_row, 2 * t, a, valid) : t == 2 && valid ? ones : 0;
        } else {
#pragma unroll
          for (int n = 0; n < N; ++n) {
            k[m][2 * n + r] = load_pair(k_row, 2 * t + 8 * n, a, true);
            v[m][2 * n + r] = load_pair(v_row, 2 * t + 8 * n, a, valid);
          }
        }
#pragma unroll
        for (int n = 0; n < N; ++n)
          k_right[m][n][r] = dev::movmatrix(valid ? k[m][2 * n + r] : 0);
        if constexpr (WIDTH == 8) k[m][r + 2] = opaque(k[m][r]);
      }
    }
  }

  // sums of another warp, or of an earlier round
  template <class Memory>
  __device__ __forceinline__ void load_sums(const Memory& memory) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        memory.load(2 * (m * N + n), dk[m][n]);
        memory.load(2 * (m * N + n) + 1, dv[m][n]);
      }
  }

  template <class Memory>
  __device__ __forceinline__ void store_sums(const Memory& memory) const {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        memory.store(2 * (m * N + n), dk[m][n]);
        memory.store(2 * (m * N + n) + 1, dv[m][n]);
      }
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[m][n][e] = dv[m][n][e] = 0;
  }

  // write dK and dV; the thread's share of sum(dV * V) before head_scale and dropout's factor
  __device__ __forceinline__ float finish(const Arguments<T>& a, int64_t b, int h, int first,
                                          float factor, bool stored) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // with SPARE dK came from the scaled q, in two parts; else from q itself
    const float k_factor = Sh::SPARE ? 1 / LOG2E : a.scale;
    float weight = 0;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = first + 16 * m + 8 * r + g;
          const float mine = used >> (2 * m + r) & 1 ? factor : 0;
          float dk_lo = dk[m][n][2 * r], dk_hi = dk[m][n][2 * r + 1];
          const float dv_lo = dv[m][n][2 * r], dv_hi = dv[m][n][2 * r + 1];
          if constexpr (Sh::SPARE) {
            dk_lo += dev::shfl_xor(dk_lo, 2);
            dk_hi += dev::shfl_xor(dk_hi, 2);
          }
          const uint32_t value = v[m][2 * n + r];
          if (!Sh::SPARE || t < 2) {
            weight = dev::fma(dv_lo, dev::unpack_lo<T>(value), weight);
            weight = dev::fma(dv_hi, dev::unpack_hi<T>(value), weight);
            store_pair(a.dk.row(b, h, key), 2 * t + 8 * n, a, stored && key < a.S, mine * k_factor * dk_lo,
                       mine * k_factor * dk_hi);
            store_pair(a.dv.row(b, h, key), 2 * t + 8 * n, a, stored && key < a.S, mine * dv_lo,
                       mine * dv_hi);
          }
        }
    return weight;
  }
};

// P^T and dS^T of 16 keys and 16 queries from the finished products, as left operands.
template <class T, int WIDTH, bool DROPOUT, int EMULATED>
__device__ __forceinline__ void weights_and_ds(const float (&s)[2][4], const float (&dp)[2][4],
                                               uint32_t (&p)[4], uint32_t (&ds)[4],
                                               const uint32_t (&dropout)[4],
                                               const uint32_t (&delta)[2]) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // an emulated exponential keeps the special-function unit free; spread them over the tile
      const float x = exp2(s[n][2 * r], 2 * n + r < EMULATED);
      const float y = exp2(s[n][2 * r + 1], 2 * n + r + 4 < EMULATED);
      p[2 * n + r] = dev::pack<T>(x, y);
      ds[2 * n + r] = dev::pack<T>(dp[n][2 * r], dp[n][2 * r + 1]);
    }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if constexpr (DROPOUT) ds[e] = (ds[e] & dropout[e]) | (delta[e / 2] & ~dropout[e]);
    ds[e] = multiply_pairs<T>(p[e], ds[e]);
    if constexpr (DROPOUT) p[e] &= dropout[e];
  }
}

// All of one block against 16 queries of the strip.
template <class T, int WIDTH, bool DROPOUT, int EMULATED>
__device__ __forceinline__ void visit_tile(Block<T, WIDTH, DROPOUT>& block, const Strip& from,
                                           int tile, const Philox& random,
                                           float (&dq)[WIDTH == 16 ? 2 : 1][4]) {
  using Sh = Shape<T, WIDTH, DROPOUT>;
  constexpr int N = Sh::PANELS;
  // right operands: q_b[part] of S^T, o_b of dP^T; transposed ones of dK and dV
  uint32_t q_b[WIDTH == 4 ? 1 : WIDTH / 8][2][2], o_b[2][2], q_t[N][2], o_t[N][2];
  uint32_t x[4];
  if constexpr (WIDTH == 4) {
    dev::ldmatrix_x4(x, from.panels(Sh::Q_HI, Sh::DO, tile));
    q_b[0][0][0] = x[0], q_b[0][1][0] = x[1], o_b[0][0] = x[2], o_b[1][0] = x[3];
  } else if constexpr (WIDTH == 8) {
    load_halves(q_b[0], from.halves(Sh::Q_HI, Sh::Q_LO, tile));
    uint32_t y[2];
    dev::ldmatrix_x2(y, from.panels(Sh::DO, Sh::DO, tile));
    o_b[0][0] = y[0], o_b[1][0] = y[1];
  } else {
    load_halves(q_b[0], from.halves(Sh::Q_HI, Sh::Q_HI + Sh::PANEL, tile));
    load_halves(q_b[1], from.halves(Sh::Q_LO, Sh::Q_LO + Sh::PANEL, tile));
    load_halves(o_b, from.halves(Sh::DO, Sh::DO + Sh::PANEL, tile));
  }
  if constexpr (N == 1) {
    dev::ldmatrix_x4_trans(x, from.panels(Sh::Q, Sh::DO, tile));
    q_t[0][0] = x[0], q_t[0][1] = x[1], o_t[0][0] = x[2], o_t[0][1] = x[3];
  } else {
    dev::ldmatrix_x4_trans(x, from.panels(Sh::Q, Sh::Q + Sh::PANEL, tile));
    q_t[0][0] = x[0], q_t[0][1] = x[1], q_t[1][0] = x[2], q_t[1][1] = x[3];
    dev::ldmatrix_x4_trans(x, from.panels(Sh::DO, Sh::DO + Sh::PANEL, tile));
    o_t[0][0] = x[0], o_t[0][1] = x[1], o_t[1][0] = x[2], o_t[1][1] = x[3];
  }
  // what is added to S^T and dP^T: the same for rows g and g + 8
  float lse[2][4], delta[2][4] = {};
  uint32_t delta_pairs[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    from.quad(Sh::LSE, 2 * tile + n, lse[n]);
    if constexpr (!Sh::SPARE) from.quad(Sh::DELTA, 2 * tile + n, delta[n]);
    if constexpr (DROPOUT) delta_pairs[n] = from.pair(Sh::DELTA_PAIRS, 2 * tile + n);
  }
  uint32_t words[4][4];
  if constexpr (DROPOUT) random.draw(tile, words);

#pragma unroll
  for (int m = 0; m < Sh::KEY_TILES; ++m) {
    float s[2][4], dp[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if constexpr (WIDTH == 4) {
        dev::mma_16x8x8<T>(s[n], block.k[m], q_b[0][n][0], lse[n]);
        dev::mma_16x8x8<T>(dp[n], block.v[m], o_b[n][0], delta[n]);
      } else {
        dev::mma_16x8x16<T>(s[n], block.k[m], q_b[0][n], lse[n]);
        if constexpr (WIDTH == 8) {
          dev::mma_16x8x8<T>(dp[n], block.v[m], o_b[n][0], delta[n]);
        } else {
          dev::mma_16x8x16<T>(s[n], block.k[m], q_b[1][n], s[n]);
          dev::mma_16x8x16<T>(dp[n], block.v[m], o_b[n], delta[n]);
        }
      }
    }
    uint32_t p[4], ds[4], dropout[4] = {0, 0, 0, 0};
    if constexpr (DROPOUT) random.keep_pairs(words, m, dropout);
    weights_and_ds<T, WIDTH, DROPOUT, EMULATED>(s, dp, p, ds,
                                                dropout, delta_pairs);
    // queries 0..7 and 8..15 of the tile, transposed: the left operand of dS K
    const uint32_t turned[4] = {dev::movmatrix(ds[0]), dev::movmatrix(ds[2]),
                                dev::movmatrix(ds[1]), dev::movmatrix(ds[3])};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      dev::mma_16x8x16<T>(block.dv[m][n], p, o_t[n], block.dv[m][n]);
      dev::mma_16x8x16<T>(block.dk[m][n], ds, q_t[n], block.dk[m][n]);
      dev::mma_16x8x16<T>(dq[n], turned, block.k_right[m][n], dq[n]);
    }
  }
}

template <class T, int WIDTH, bool DROPOUT, int EMULATED>
__global__ void __launch_bounds__(THREADS, WIDTH == 16 ? 2 : 3)
    backward_kernel(const Arguments<T> a) {
  using Sh = Shape<T, WIDTH, DROPOUT>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, W = a.warps_per_head;
  const int groups = (a.H + WARPS / W - 1) / (WARPS / W);
  const int64_t b = blockIdx.x / groups;
  const int first_head = blockIdx.x % groups * (WARPS / W);
  // Control flow is the same in all warps: one without a head of its own repeats the last head,
  // one without queries or keys adds zeros, and neither stores.
  const int part = warp % W, own = first_head + warp / W, h = min(own, a.H - 1);
  const bool stored = own < a.H;
  const Strip from(warp * Sh::STRIP);
  const int blocks = (a.S + Sh::KEYS - 1) / Sh::KEYS;
  const int other = first_key(a, b);
  const float factor = output_factor(a, h);
  float weight = 0;

  for (int first = 0; first < a.L; first += W * a.strip) {
    if (first > 0) dev::block_barrier();
    stage_queries<T, WIDTH, DROPOUT>(a, b, first_head, first);
    dev::block_barrier();
    const bool last_round = first + W * a.strip >= a.L;
    const int first_query = first + part * a.strip;
    const int tiles = (min(a.strip, a.L - first) + 15) / 16;
    float dq[Sh::QUERY_TILES][Sh::PANELS][4];
#pragma unroll
    for (int i = 0; i < Sh::QUERY_TILES; ++i)
#pragma unroll
      for (int n = 0; n < Sh::PANELS; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[i][n][e] = 0;

    for (int group = 0; group < blocks; group += W) {
      for (int turn = 0; turn < W; ++turn) {
        const int in_group = (part + turn) % W, index = group + in_group;
        const SharedSums sums(WARPS * Sh::STRIP + (warp - part + in_group) * Sh::SUMS, Sh::SUMS);
        const GlobalSums saved{a.sums + ((b * a.H + h) * blocks + index) * (Sh::SUMS / 4),
                               stored && index < blocks};
        Block<T, WIDTH, DROPOUT> block;
        block.load(a, b, h, index * Sh::KEYS, other);
        if (turn > 0) {
          block.load_sums(sums);
        } else if (first > 0) {
          block.load_sums(saved);
        } else {
          block.clear_sums();
        }
        const Philox random(a, b * a.H + h, first_query, index);
#pragma unroll
        for (int i = 0; i < Sh::QUERY_TILES; ++i) {
          if (i >= tiles) break;
          visit_tile<T, WIDTH, DROPOUT, EMULATED>(block, from, i, random, dq[i]);
        }
        if (turn + 1 < W) {
          block.store_sums(sums);
        } else if (!last_round) {
          block.store_sums(saved);
        } else {
          weight += block.finish(a, b, h, index * Sh::KEYS, factor, stored);
        }
        if (W > 1) dev::block_barrier();
      }
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < Sh::QUERY_TILES; ++i)
#pragma unroll
      for (int n = 0; n < Sh::PANELS; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int in_strip = 16 * i + 8 * r + g, query = first_query + in_strip;
          const bool valid = stored && in_strip < a.strip && query < a.L && (!Sh::SPARE || t < 2);
          store_pair(a.dq.row(b, h, query), 2 * t + 8 * n, a, valid,
                     dq[i][n][2 * r] * factor * a.scale, dq[i][n][2 * r + 1] * factor * a.scale);
        }
  }
  if (a.dhead_scale && stored) store_dhead_scale(a, b, h, part, weight);
}

}  // namespace attention_bwd
