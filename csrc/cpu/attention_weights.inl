// Softmax weights of one head, added to those of other heads, and what they give: all keys of a few
// queries lie in the cache at once, so that every weight is computed once.
//
// Included once per instruction set, after attention_tile.inl.

// queries whose weights fit beside keys and values into a first-level cache
inline int64_t block_of(const AttentionHead& h) {
  const int64_t fits = 2 * TILE / std::max<int64_t>(h.S, 1) / PAD * PAD;
  return std::min(h.padded_l, std::clamp<int64_t>(fits, PAD, 64));
}

// v where the weight of key j and these queries is not dropped, else 0
template <bool DROP>
inline Vec kept(const AttentionHead& h, Vec v, int64_t j, int64_t i) {
  return DROP ? where_kept(v, h.keep + j * (h.padded_l / PAD) + i / PAD, i % PAD) : v;
}

struct AnyExp2 {
  inline Vec operator()(Vec x) const { return exp2_any(x); }
};

// one vector of queries: p (S rows, stride apart) of log2 weights less shift -> weights; their sum
template <bool DROP, class Exp>
inline Vec exponentials(const AttentionHead& h, const Exp& exp, int64_t i, float* p, int64_t stride,
                        Vec shift) {
  Vec total = {};
  for (int64_t first = 0; first < h.S; first += RUN) {
    Vec part = {};
    for (int64_t j = first; j < std::min(h.S, first + RUN); ++j) {
      float* at = p + j * stride;
      const Vec weight = exp(load(at) - shift);
      part += weight;
      store(at, kept<DROP>(h, weight, j, i));
    }
    total += part;
  }
  return total;
}

// Weights times `total` of the queries i.., (S, queries), without those that are dropped if DROP;
// top: log2 of what they are multiplied by to be at most 1, or 0 where that is not needed
template <bool DROP>
void softmax_block(const AttentionHead& h, int64_t i, int64_t queries, float* p, float* top,
                   float* total) {
  if (h.S > 0) logits(h, 0, h.S, i, queries, p, queries);
  for (int64_t c = 0; c < queries; c += LANES) {
    Vec shift = {};
    if (!h.unshifted) {
      shift = fill(-3e38f);  // a row without keys
      for (int64_t j = 0; j < h.S; ++j) shift = maximum(load(p + j * queries + c), shift);
    }
    const bool small = h.unshifted && h.bias == nullptr;
    store(top + c, h.S > 0 ? shift : Vec{});
    store(total + c, small ? exponentials<DROP>(h, Exp2(), i + c, p + c, queries, shift)
                           : exponentials<DROP>(h, AnyExp2(), i + c, p + c, queries, shift));
  }
}

// out (D, padded_l), if there is one; lse (padded_l,); sum (S, padded_l): added to, without dropout's
// factor
void add_weights(const AttentionHead& h, float* out, float* lse, float* sum) {
  const int64_t block = block_of(h);
  Scratch scratch(h.S * block + 2 * block);
  float *p = scratch.data(), *top = p + h.S * block, *total = top + block;
  const float factor = h.head_scale * (h.keep ? h.keep_factor : 1.0f);
  for (int64_t i = 0; i < h.padded_l; i += block) {
    const int64_t queries = std::min(block, h.padded_l - i);
    h.keep ? softmax_block<true>(h, i, queries, p, top, total)
           : softmax_block<false>(h, i, queries, p, top, total);
    for (int64_t d = 0; out && d < h.D; ++d) {
      std::fill_n(out + d * h.padded_l + i, queries, 0.0f);
    }
    for (int64_t j = 0; out && j < h.S; j += RUN) {
      product({h.v + j * h.D, 1, h.D}, p + j * queries, queries, std::min(RUN, h.S - j), out + i,
              h.padded_l, h.D, queries, true);
    }
    for (int64_t c = 0; c < queries; c += LANES) {
      const Vec sums = load(total + c), norm = sums == 0.0f ? Vec{} : 1.0f / sums;
      store(lse + i + c, load(top + c) * 0.693147181f + logarithm(sums));
      for (int64_t d = 0; out && d < h.D; ++d) {
        float* at = out + d * h.padded_l + i + c;
        store(at, load(at) * (norm * factor));
      }
      for (int64_t j = 0; j < h.S; ++j) {
        float* at = sum + j * h.padded_l + i + c;
        store(at, load(at) + load(p + j * queries + c) * norm);
      }
    }
  }
}

// the gradient of one vector of queries' weights (S, padded_l) -> that of their logits, in place of
// p, whose sum is total: divided by it, as the one weight of a row is then 1 and its gradient 0
template <bool DROP>
inline void logit_gradients(const AttentionHead& h, const float* dweights, int64_t i, float* p,
                            int64_t stride, Vec total) {
  const Vec divisor = total == 0.0f ? fill(1.0f) : total;
  Vec delta = {};
  for (int64_t j = 0; j < h.S; ++j) {
    float* at = p + j * stride;
    const Vec weight = load(at) / divisor;
    delta += weight * kept<DROP>(h, load(dweights + j * h.padded_l + i), j, i);
    store(at, weight);
  }
  for (int64_t j = 0; j < h.S; ++j) {
    float* at = p + j * stride;
    store(at, load(at) * (kept<DROP>(h, load(dweights + j * h.padded_l + i), j, i) - delta));
  }
}

// As `backward`, for the gradient of `sum` in `add_weights`, which g.dout holds: (S, padded_l). No dv.
void weights_backward(const AttentionHead& h, const AttentionGradient& g) {
  const int64_t block = block_of(h);
  Scratch scratch(h.S * block + 2 * block);
  float *p = scratch.data(), *top = p + h.S * block, *total = top + block;
  std::fill(g.dq, g.dq + h.D * h.padded_l, 0.0f);
  std::fill(g.dk, g.dk + h.S * h.D, 0.0f);
  for (int64_t i = 0; h.S > 0 && i < h.padded_l; i += block) {
    const int64_t queries = std::min(block, h.padded_l - i);
    softmax_block<false>(h, i, queries, p, top, total);
    for (int64_t c = 0; c < queries; c += LANES) {
      h.keep ? logit_gradients<true>(h, g.dout, i + c, p + c, queries, load(total + c))
             : logit_gradients<false>(h, g.dout, i + c, p + c, queries, load(total + c));
    }
    if (g.dbias) add_bias_gradient(h, g, 0, h.S, i, queries, p, queries);
    product({h.k, 1, h.D}, p, queries, h.S, g.dq + i, h.padded_l, h.D, queries, true);
    if (h.D <= MAX_FUSED) {
      product_along(p, queries, h.q + i, h.padded_l, queries, g.dk, h.S, h.D);
    } else {
      product({p, queries, 1}, g.q_rows + i * h.D, h.D, queries, g.dk, h.D, h.S, h.D, true);
    }
  }
}
