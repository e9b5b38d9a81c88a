// Attention of one narrow head: a weight lives in registers from its logit to its last use.
//
// For logits so small that exponentials need no shift, and without a bias. Included once per
// instruction set.

// keys whose terms are added one by one before they join the rest: the sum of a long row is then as
// exact as that of a short one
constexpr int64_t RUN = 32;

// R vectors of queries from i on, all keys
template <int D, int R, bool DROP>
inline void forward_rows(const AttentionHead& h, int64_t i, float* out, float* lse) {
  const Exp2 exp2;
  const int64_t stride = h.padded_l, groups = h.padded_l / PAD;
  Vec q[R][D], o_all[R][D] = {}, total_all[R] = {};
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int d = 0; d < D; ++d) q[r][d] = load(h.q + d * stride + i + r * LANES);
  }
  const float *k = h.k, *v = h.v;
  for (int64_t first = 0; first < h.S; first += RUN) {
    Vec o[R][D] = {}, total[R] = {};
    const int64_t last = std::min(h.S, first + RUN);
    for (int64_t j = first; j < last; ++j, k += D, v += D) {
      UNROLL for (int r = 0; r < R; ++r) {
        Vec s = q[r][0] * k[0];
        UNROLL for (int d = 1; d < D; ++d) s += q[r][d] * k[d];
        Vec p = exp2(s);
        total[r] += p;
        const int64_t row = i + r * LANES;
        if (DROP) p = where_kept(p, h.keep + j * groups + row / PAD, row % PAD);
        UNROLL for (int d = 0; d < D; ++d) o[r][d] += p * v[d];
      }
    }
    UNROLL for (int r = 0; r < R; ++r) {
      total_all[r] += total[r];
      UNROLL for (int d = 0; d < D; ++d) o_all[r][d] += o[r][d];
    }
  }
  const float factor = h.head_scale * (DROP ? h.keep_factor : 1.0f);
  UNROLL for (int r = 0; r < R; ++r) {
    store(lse + i + r * LANES, logarithm(total_all[r]));
    UNROLL for (int d = 0; d < D; ++d) {
      store(out + d * stride + i + r * LANES, o_all[r][d] * factor / total_all[r]);
    }
  }
}

template <int D, int R, bool DROP>
void forward_fused(const AttentionHead& h, float* out, float* lse) {
  int64_t i = 0;
  for (; i + R * LANES <= h.padded_l; i += R * LANES) forward_rows<D, R, DROP>(h, i, out, lse);
  for (; i < h.padded_l; i += LANES) forward_rows<D, 1, DROP>(h, i, out, lse);
}

// What the gradient reads for every vector of queries. With w = exp(-lse), so that a weight is
// w 2^s: dout times w (and dropout's factor), delta times w.
struct Normalised {
  const float* dout;
  const float* delta;
  const float* v;  // values times the head's scale
};

// The queries i.. of one vector, keys first.. to last: the sums of the queries stay in registers, those
// of the keys in memory, one vector per channel
template <int D, bool DROP>
inline void backward_rows(const AttentionHead& h, const AttentionGradient& g, const Normalised& n,
                          int64_t i, int64_t first, int64_t last, float* sums) {
  const Exp2 exp2;
  const int64_t stride = h.padded_l, groups = h.padded_l / PAD;
  Vec q[D], dout[D], dq[D] = {};
  UNROLL for (int d = 0; d < D; ++d) {
    q[d] = load(h.q + d * stride + i);
    dout[d] = load(n.dout + d * stride + i);
  }
  const Vec delta = load(n.delta + i);
  for (int64_t j = first; j < last; ++j, sums += 2 * D * LANES) {
    const float *k = h.k + j * D, *v = n.v + j * D;
    Vec s = q[0] * k[0];
    UNROLL for (int d = 1; d < D; ++d) s += q[d] * k[d];
    const Vec p = exp2(s);
    Vec kept = p, dp = DROP ? Vec{} : -delta;
    UNROLL for (int d = 0; d < D; ++d) dp += dout[d] * v[d];
    if (DROP) {
      const uint16_t* bits = h.keep + j * groups + i / PAD;
      kept = where_kept(p, bits, i % PAD);
      dp = where_kept(dp, bits, i % PAD) - delta;
    }
    const Vec ds = p * dp;
    UNROLL for (int d = 0; d < D; ++d) {
      float *dk = sums + d * LANES, *dv = sums + (D + d) * LANES;
      store(dv, load(dv) + kept * dout[d]);
      store(dk, load(dk) + ds * q[d]);
      dq[d] += ds * k[d];
    }
  }
  UNROLL for (int d = 0; d < D; ++d) {
    float* at = g.dq + d * stride + i;
    store(at, load(at) + dq[d]);
  }
}

template <int D, bool DROP>
void backward_fused(const AttentionHead& h, const AttentionGradient& g) {
  // sums of so many keys fill half of a first-level cache
  constexpr int64_t KEYS = 16 * 1024 / (2 * D * LANES * 4);
  const int64_t stride = h.padded_l;
  Scratch scratch(KEYS * 2 * D * LANES + (D + 1) * stride + h.S * D);
  float *sums = scratch.data(), *dout = sums + KEYS * 2 * D * LANES, *delta = dout + D * stride;
  float* v = delta + stride;
  const float factor = DROP ? h.keep_factor : 1.0f;
  for (int64_t i = 0; i < stride; i += LANES) {
    const Normaliser norm(load(g.lse + i));
    const Vec w = exp2_any(-norm.whole) * norm.rest;
    store(delta + i, load(g.delta + i) * w);
    for (int d = 0; d < D; ++d) {
      store(dout + d * stride + i, load(g.dout + d * stride + i) * (w * factor));
    }
  }
  for (int64_t c = 0; c < h.S * D; ++c) v[c] = h.v[c] * h.head_scale;
  std::fill(g.dq, g.dq + D * stride, 0.0f);
  for (int64_t first = 0; first < h.S; first += KEYS) {
    const int64_t last = std::min(h.S, first + KEYS);
    std::fill(sums, sums + KEYS * 2 * D * LANES, 0.0f);
    for (int64_t i = 0; i < stride; i += LANES) {
      backward_rows<D, DROP>(h, g, {dout, delta, v}, i, first, last, sums);
    }
    for (int64_t j = first; j < last; ++j) {
      Vec sum[2 * D];
      float row[2 * D];
      for (int c = 0; c < 2 * D; ++c) sum[c] = load(sums + ((j - first) * 2 * D + c) * LANES);
      store_sums<2 * D>(row, sum);
      std::copy(row, row + D, g.dk + j * D);
      std::copy(row + D, row + 2 * D, g.dv + j * D);
    }
  }
}
