// Attention of one head of any width, with a bias or logits of any size: weights are computed tile by
// tile (keys x queries) in the cache, with small matrix products around the exponentials.
//
// Included once per instruction set.

// One strided factor of a product, read as scalars: element (row, inner)
struct Scalars {
  const float* data;
  int64_t row, inner;
};

// C (ROWS, COLS vectors) (+)= A (ROWS, inner) B (inner, COLS vectors)
template <int ROWS, int COLS>
inline void product_block(const Scalars& a, const float* b, int64_t b_stride, int64_t inner, float* c,
                          int64_t c_stride, bool add) {
  Vec sum[ROWS][COLS] = {};
  for (int64_t x = 0; x < inner; ++x) {
    UNROLL for (int n = 0; n < COLS; ++n) {
      const Vec column = load(b + x * b_stride + n * LANES);
      UNROLL for (int m = 0; m < ROWS; ++m) sum[m][n] += column * a.data[m * a.row + x * a.inner];
    }
  }
  UNROLL for (int m = 0; m < ROWS; ++m) {
    UNROLL for (int n = 0; n < COLS; ++n) {
      float* at = c + m * c_stride + n * LANES;
      store(at, add ? load(at) + sum[m][n] : sum[m][n]);
    }
  }
}

// ROWS at a time, what remains by halves
template <int ROWS, int COLS>
void product_columns(Scalars a, const float* b, int64_t b_stride, int64_t inner, float* c,
                     int64_t c_stride, int64_t rows, bool add) {
  for (; rows >= ROWS; rows -= ROWS, a.data += ROWS * a.row, c += ROWS * c_stride) {
    product_block<ROWS, COLS>(a, b, b_stride, inner, c, c_stride, add);
  }
  if constexpr (ROWS > 1) {
    if (rows > 0) {
      product_columns<ROWS / 2, COLS>(a, b, b_stride, inner, c, c_stride, rows, add);
    }
  }
}

// C (rows, columns floats) (+)= A (rows, inner) B (inner, columns); columns: a multiple of LANES
void product(Scalars a, const float* b, int64_t b_stride, int64_t inner, float* c, int64_t c_stride,
             int64_t rows, int64_t columns, bool add) {
  constexpr int SUMS = LANES == 16 ? 16 : 8;  // half of the registers
  int64_t n = 0;
  for (; n + 4 * LANES <= columns; n += 4 * LANES) {
    product_columns<SUMS / 4, 4>(a, b + n, b_stride, inner, c + n, c_stride, rows, add);
  }
  for (; n + 2 * LANES <= columns; n += 2 * LANES) {
    product_columns<SUMS / 2, 2>(a, b + n, b_stride, inner, c + n, c_stride, rows, add);
  }
  for (; n < columns; n += LANES) {
    product_columns<SUMS, 1>(a, b + n, b_stride, inner, c + n, c_stride, rows, add);
  }
}

// C (rows, D) += A (rows, queries) B^T for B (D, queries): both factors lie along the vectors
void product_along(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                   int64_t queries, float* c, int64_t rows, int64_t D) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t d = 0; d < D; ++d) {
      Vec sum = {};
      float total;
      for (int64_t i = 0; i < queries; i += LANES) {
        sum += load(a + m * a_stride + i) * load(b + d * b_stride + i);
      }
      store_sums<1>(&total, &sum);
      c[m * D + d] += total;
    }
  }
}

// 64 x 64 and 16 x 256 floats fill half of a first-level cache; a narrow head has its gradient of
// the keys reduced across vectors, which long rows amortise
constexpr int64_t TILE = 64 * 64;

struct Tile {
  int64_t keys, queries;  // at most
};

inline Tile tile_of(const AttentionHead& h) {
  const int64_t queries = std::min<int64_t>(h.padded_l, h.D <= MAX_FUSED ? 256 : 64);
  return {TILE / queries, queries};
}

// log2 weights of keys j.. and queries i..: (keys, queries), rows stride apart
inline void logits(const AttentionHead& h, int64_t j, int64_t keys, int64_t i, int64_t queries,
                   float* tile, int64_t stride) {
  for (int64_t d = 0; d < h.D; d += 64) {  // so a long sum is as exact as a short one
    product({h.k + j * h.D + d, h.D, 1}, h.q + d * h.padded_l + i, h.padded_l,
            std::min<int64_t>(64, h.D - d), tile, stride, keys, queries, d > 0);
  }
  if (h.bias == nullptr) return;
  for (int64_t c = 0; c < queries; c += LANES) {  // so few rows of the bias stay in the cache
    const int64_t rows = std::min<int64_t>(LANES, h.L - i - c);
    const float* bias = h.bias + (i + c) * h.bias_l;
    for (int64_t r = 0; r < keys; ++r) {
      const float* key = bias + h.index[j + r] * h.bias_s;
      Vec column = {};
      if (rows == LANES) {
        UNROLL for (int x = 0; x < LANES; ++x) column[x] = key[x * h.bias_l];
      } else {
        for (int64_t x = 0; x < rows; ++x) column[x] = key[x * h.bias_l];
      }
      float* at = tile + r * stride + c;
      store(at, load(at) + column * 1.44269504f);
    }
  }
}

// What the softmax of one block of queries has seen so far; arrays of `queries`
struct Running {
  float* top;    // largest log2 weight, 0 where no shift is needed
  float* total;  // sum of the weights
};

// log2 weights -> weights times 2^-top in place; rescales what came before, also in out (D, queries)
// if there is one
inline void weights(const AttentionHead& h, int64_t j, int64_t keys, int64_t i, int64_t queries,
                    float* tile, int64_t stride, const Running& run, float* out) {
  const int64_t groups = h.padded_l / PAD;
  for (int64_t c = 0; c < queries; c += LANES) {
    Vec shift = load(run.top + c), before = load(run.total + c), total = {};
    if (!h.unshifted) {
      const Vec old = shift;
      for (int64_t r = 0; r < keys; ++r) shift = maximum(load(tile + r * stride + c), shift);
      store(run.top + c, shift);
      shift = maximum(shift, fill(-3e38f));  // no keys yet: -inf - shift stays -inf
      const Vec shrink = exp2_any(old - shift);
      before *= shrink;
      for (int64_t d = 0; out != nullptr && d < h.D; ++d) {
        float* at = out + d * h.padded_l + i + c;
        store(at, load(at) * shrink);
      }
    }
    for (int64_t r = 0; r < keys; ++r) {
      float* at = tile + r * stride + c;
      Vec p = exp2_any(load(at) - shift);
      total += p;
      if (h.keep) p = where_kept(p, h.keep + (j + r) * groups + (i + c) / PAD, (i + c) % PAD);
      store(at, p);
    }
    store(run.total + c, before + total);
  }
}

void forward_tiled(const AttentionHead& h, float* out, float* lse) {
  const Tile tile = tile_of(h);
  Scratch scratch(TILE + 2 * tile.queries);
  const Running run{scratch.data() + TILE, scratch.data() + TILE + tile.queries};
  const float factor = h.head_scale * (h.keep ? h.keep_factor : 1.0f);
  std::fill(out, out + h.D * h.padded_l, 0.0f);
  for (int64_t i = 0; i < h.padded_l; i += tile.queries) {
    const int64_t queries = std::min(tile.queries, h.padded_l - i);
    std::fill(run.top, run.top + queries, h.unshifted ? 0.0f : -INFINITY);
    std::fill(run.total, run.total + queries, 0.0f);
    for (int64_t j = 0; j < h.S; j += tile.keys) {
      const int64_t keys = std::min(tile.keys, h.S - j);
      logits(h, j, keys, i, queries, scratch.data(), tile.queries);
      weights(h, j, keys, i, queries, scratch.data(), tile.queries, run, out);
      product({h.v + j * h.D, 1, h.D}, scratch.data(), tile.queries, keys, out + i, h.padded_l, h.D,
              queries, true);
    }
    for (int64_t c = 0; c < queries; c += LANES) {
      const Vec total = load(run.total + c);
      const Vec divisor = total == 0.0f ? fill(1.0f) : total;
      store(lse + i + c, load(run.top + c) * 0.693147181f + logarithm(total));
      for (int64_t d = 0; d < h.D; ++d) {
        float* at = out + d * h.padded_l + i + c;
        store(at, load(at) * factor / divisor);
      }
    }
  }
}

// A weight is 2^(its log2 - shift) * factor; arrays of padded_l. Where logits are large, lse has lost
// what it takes to tell 2^-lse from what these very logits add up to: they are added up again.
void normalise_rows(const AttentionHead& h, const float* lse, const Tile& tile, float* scratch,
                    float* shift, float* factor) {
  for (int64_t i = 0; i < h.padded_l; i += LANES) {
    const Normaliser norm(load(lse + i));
    store(shift + i, h.unshifted ? norm.whole : fill(-INFINITY));
    store(factor + i, h.unshifted ? norm.rest : Vec{});
  }
  if (h.unshifted) return;
  for (int64_t i = 0; i < h.padded_l; i += tile.queries) {
    const int64_t queries = std::min(tile.queries, h.padded_l - i);
    for (int64_t j = 0; j < h.S; j += tile.keys) {
      const int64_t keys = std::min(tile.keys, h.S - j);
      logits(h, j, keys, i, queries, scratch, tile.queries);
      weights(h, j, keys, i, queries, scratch, tile.queries, {shift + i, factor + i}, nullptr);
    }
  }
  for (int64_t i = 0; i < h.padded_l; i += LANES) {
    const Vec total = load(factor + i);
    store(factor + i, total == 0.0f ? Vec{} : 1.0f / total);
    store(shift + i, maximum(load(shift + i), fill(-3e38f)));  // a row without keys
  }
}

// log2 weights and gradients of kept weights -> kept weights and gradients of the logits, in place
inline void weight_gradients(const AttentionHead& h, const AttentionGradient& g, int64_t j,
                             int64_t keys, int64_t i, int64_t queries, const float* shifts,
                             const float* factors, float* p_tile, float* ds_tile, int64_t stride) {
  const int64_t groups = h.padded_l / PAD;
  const float factor = h.keep ? h.keep_factor : 1.0f;
  for (int64_t c = 0; c < queries; c += LANES) {
    const Vec shift = load(shifts + i + c), norm = load(factors + i + c);
    const Vec delta = load(g.delta + i + c);
    for (int64_t r = 0; r < keys; ++r) {
      float *p_at = p_tile + r * stride + c, *ds_at = ds_tile + r * stride + c;
      const Vec p = exp2_any(load(p_at) - shift) * norm;
      Vec kept = p, dp = load(ds_at) * (h.head_scale * factor);
      if (h.keep) {
        const uint16_t* bits = h.keep + (j + r) * groups + (i + c) / PAD;
        kept = where_kept(p, bits, (i + c) % PAD) * factor;
        dp = where_kept(dp, bits, (i + c) % PAD);
      }
      store(p_at, kept);
      store(ds_at, p * (dp - delta));
    }
  }
}

inline void add_bias_gradient(const AttentionHead& h, const AttentionGradient& g, int64_t j,
                              int64_t keys, int64_t i, int64_t queries, const float* ds,
                              int64_t stride) {
  for (int64_t c = 0; c < queries; c += LANES) {
    const int64_t end = std::min(c + LANES, h.L - i);
    for (int64_t r = 0; r < keys; ++r) {
      float* dbias = g.dbias + i * g.dbias_l + h.index[j + r] * g.dbias_s;
      for (int64_t x = c; x < end; ++x) dbias[x * g.dbias_l] += ds[r * stride + x];
    }
  }
}

void backward_tiled(const AttentionHead& h, const AttentionGradient& g) {
  const Tile tile = tile_of(h);
  const int64_t stride = tile.queries;
  Scratch scratch(2 * TILE + 2 * h.padded_l);
  float *p = scratch.data(), *ds = p + TILE, *shift = ds + TILE, *factor = shift + h.padded_l;
  normalise_rows(h, g.lse, tile, p, shift, factor);
  std::fill(g.dq, g.dq + h.D * h.padded_l, 0.0f);
  std::fill(g.dk, g.dk + h.S * h.D, 0.0f);
  std::fill(g.dv, g.dv + h.S * h.D, 0.0f);
  for (int64_t j = 0; j < h.S; j += tile.keys) {
    const int64_t keys = std::min(tile.keys, h.S - j);
    const float *k = h.k + j * h.D, *v = h.v + j * h.D;
    float *dk = g.dk + j * h.D, *dv = g.dv + j * h.D;
    for (int64_t i = 0; i < h.padded_l; i += tile.queries) {
      const int64_t queries = std::min(tile.queries, h.padded_l - i);
      logits(h, j, keys, i, queries, p, stride);
      product({v, h.D, 1}, g.dout + i, h.padded_l, h.D, ds, stride, keys, queries, false);
      weight_gradients(h, g, j, keys, i, queries, shift, factor, p, ds, stride);
      if (g.dbias) add_bias_gradient(h, g, j, keys, i, queries, ds, stride);
      product({k, 1, h.D}, ds, stride, keys, g.dq + i, h.padded_l, h.D, queries, true);
      if (h.D <= MAX_FUSED) {
        product_along(p, stride, g.dout + i, h.padded_l, queries, dv, keys, h.D);
        product_along(ds, stride, h.q + i, h.padded_l, queries, dk, keys, h.D);
      } else {
        const int64_t rows = i * h.D;
        product({p, stride, 1}, g.dout_rows + rows, h.D, queries, dv, h.D, keys, h.D, true);
        product({ds, stride, 1}, g.q_rows + rows, h.D, queries, dk, h.D, keys, h.D, true);
      }
    }
  }
}

inline float largest_of(Vec v) {
  float most = 0;
  for (int i = 0; i < LANES; ++i) most = std::max(most, v[i]);
  return most;
}

// |bias| where it is not -inf, which needs no shift: its weight is 0
float largest_bias(const AttentionHead& h) {
  Vec most = {};
  float rest = 0;
  for (int64_t i = 0; i < (h.bias_l == 0 ? 1 : h.L); ++i) {
    const float* row = h.bias + i * h.bias_l;
    const int64_t columns = h.bias_s == 0 ? 1 : h.all_keys;
    int64_t j = 0;
    for (; h.bias_s == 1 && j + LANES <= columns; j += LANES) {
      const Vec b = load(row + j), size = b < 0.0f ? -b : b;
      most = maximum(b == -INFINITY ? Vec{} : size, most);
    }
    for (; j < columns; ++j) {
      const float b = row[j * h.bias_s];
      if (b != -INFINITY) rest = std::max(rest, std::fabs(b));
    }
  }
  return std::max(rest, largest_of(most));
}

float largest_logit(const AttentionHead& h) {
  Vec most_q = {}, most_k = {};
  for (int64_t i = 0; i < h.padded_l; i += LANES) {
    Vec square = {};
    for (int64_t d = 0; d < h.D; ++d) {
      const Vec q = load(h.q + d * h.padded_l + i);
      square += q * q;
    }
    most_q = maximum(square, most_q);
  }
  const int64_t step = std::max<int64_t>(h.D, LANES);  // whole rows, one or several
  for (int64_t first = 0; first < h.S * h.D; first += step) {
    Vec square = {};
    for (int64_t c = 0; c < step; c += LANES) {
      const Vec k = load(h.k + first + c);
      square += k * k;
    }
    for (int64_t n = std::min<int64_t>(h.D, LANES); n > 1; n /= 2) {
      square = add_pairs(square, square, std::make_integer_sequence<int, LANES>());
    }
    most_k = maximum(square, most_k);
  }
  const float product = std::sqrt(largest_of(most_q)) * std::sqrt(largest_of(most_k));
  return h.bias == nullptr ? product : product + largest_bias(h) * 1.44269504f;
}
