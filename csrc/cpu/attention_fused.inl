// Attention of one narrow head: a weight lives in registers from its logit to its last use.
//
// For logits so small that exponentials need no shift, and without a bias. Included once per
// instruction set.

#define UNROLL _Pragma("GCC unroll 16")

// R vectors of queries from i on, all keys
template <int D, int R, bool DROP>
inline void forward_rows(const AttentionHead& h, int64_t i, float* out, float* lse) {
  const Exp2 exp2;
  const int64_t stride = h.padded_l, groups = h.padded_l / PAD;
  Vec q[R][D], o[R][D], total[R];
  UNROLL for (int r = 0; r < R; ++r) {
    total[r] = Vec{};
    UNROLL for (int d = 0; d < D; ++d) {
      q[r][d] = load(h.q + d * stride + i + r * LANES);
      o[r][d] = Vec{};
    }
  }
  const float *k = h.k, *v = h.v;
  for (int64_t j = 0; j < h.S; ++j, k += D, v += D) {
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
  const float factor = h.head_scale * (DROP ? h.keep_factor : 1.0f);
  UNROLL for (int r = 0; r < R; ++r) {
    const Vec norm = factor / total[r];
    store(lse + i + r * LANES, logarithm(total[r]));
    UNROLL for (int d = 0; d < D; ++d) store(out + d * stride + i + r * LANES, o[r][d] * norm);
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
};

// R keys from j on, all queries: their sums stay in registers, those of the queries in memory
template <int D, int R, bool DROP>
inline void backward_keys(const AttentionHead& h, const AttentionGradient& g, const Normalised& n,
                          int64_t j) {
  const Exp2 exp2;
  const int64_t stride = h.padded_l, groups = h.padded_l / PAD;
  const float* k = h.k + j * D;
  float v[R * D];
  for (int c = 0; c < R * D; ++c) v[c] = h.v[j * D + c] * h.head_scale;
  Vec dk[R][D], dv[R][D];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int d = 0; d < D; ++d) dk[r][d] = dv[r][d] = Vec{};
  }
  for (int64_t i = 0; i < h.padded_l; i += LANES) {
    const Vec delta = load(n.delta + i);
    Vec q[D], dout[D], dq[D];
    UNROLL for (int d = 0; d < D; ++d) {
      q[d] = load(h.q + d * stride + i);
      dout[d] = load(n.dout + d * stride + i);
      dq[d] = load(g.dq + d * stride + i);
    }
    UNROLL for (int r = 0; r < R; ++r) {
      Vec s = q[0] * k[r * D];
      UNROLL for (int d = 1; d < D; ++d) s += q[d] * k[r * D + d];
      const Vec p = exp2(s);
      Vec kept = p, dp = DROP ? Vec{} : -delta;
      UNROLL for (int d = 0; d < D; ++d) dp += dout[d] * v[r * D + d];
      if (DROP) {
        const uint16_t* bits = h.keep + (j + r) * groups + i / PAD;
        kept = where_kept(p, bits, i % PAD);
        dp = where_kept(dp, bits, i % PAD) - delta;
      }
      const Vec ds = p * dp;
      UNROLL for (int d = 0; d < D; ++d) {
        dv[r][d] += kept * dout[d];
        dk[r][d] += ds * q[d];
        dq[d] += ds * k[r * D + d];
      }
    }
    UNROLL for (int d = 0; d < D; ++d) store(g.dq + d * stride + i, dq[d]);
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int d = 0; d < D; ++d) {
      g.dk[(j + r) * D + d] = sum_of(dk[r][d]);
      g.dv[(j + r) * D + d] = sum_of(dv[r][d]);
    }
  }
}

template <int D, int R, bool DROP>
void backward_fused(const AttentionHead& h, const AttentionGradient& g) {
  const int64_t stride = h.padded_l;
  Scratch scratch((D + 1) * stride);
  const Normalised n{scratch.data(), scratch.data() + D * stride};
  const float factor = DROP ? h.keep_factor : 1.0f;
  for (int64_t i = 0; i < stride; i += LANES) {
    const Vec w = exp2_any(load(g.lse + i) * -1.44269504f);
    store(scratch.data() + D * stride + i, load(g.delta + i) * w);
    for (int d = 0; d < D; ++d) {
      store(scratch.data() + d * stride + i, load(g.dout + d * stride + i) * (w * factor));
      store(g.dq + d * stride + i, Vec{});
    }
  }
  int64_t j = 0;
  for (; j + R <= h.S; j += R) backward_keys<D, R, DROP>(h, g, n, j);
  for (; j < h.S; ++j) backward_keys<D, 1, DROP>(h, g, n, j);
}
