// Softmax-weighted mean of the tokens for neighbouring heads of one image, in one pass over them.
//
// Included once per instruction set, after vectors.inl. The chunked softmax keeps a running maximum, so any number of tokens works.

// tokens between two rescalings, a multiple of every LANES; 16, 32 and 64 were timed, 64 won
constexpr int64_t CHUNK = 64;

// e^x for x <= 0 to 2 ulp: 2^n times a polynomial on |r| <= ln(2)/2 (Cody and Waite's reduction).
// Below -87 it stays at e^-87; a NaN stays a NaN.
inline Vec exp_nonpositive(Vec x) {
  x = x < -87.0f ? fill(-87.0f) : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  Vec shifted = x * 1.44269504f + round;
  Vec n = shifted - round;
  Vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vec p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Vec)(((IntVec)shifted + 127) << 23);
}

// one number per head -> vector J of the same numbers, one per channel, for heads of D channels
template <int D, int J, int... I>
inline Vec spread(Vec per_head, std::integer_sequence<int, I...>) {
  return pick(per_head, per_head, std::integer_sequence<int, ((J * LANES + I) / D)...>());
}

// the D neighbouring products x * w of each of LANES heads, added
template <int D, class T>
inline Vec scores(const T* x, const float* w) {
  Vec v[D];
  for (int j = 0; j < D; ++j) v[j] = load(x + j * LANES) * load(w + j * LANES);
  for (int n = D / 2; n > 0; n /= 2) {
    for (int j = 0; j < n; ++j) v[j] = add_pairs(v[2 * j], v[2 * j + 1], Lanes());
  }
  return v[0];
}

// asks for the next chunk early: a block's channels are too short a run for the hardware to guess
template <int D, class T>
inline void prefetch(const T* x) {
  for (int c = 0; c < D * LANES; c += 64 / sizeof(T)) __builtin_prefetch(x + c);
}

// LANES neighbouring heads of D channels each; x points at their first channel in token 0
template <int D, class T, int... J>
void pool_block(const T* x, int64_t stride_n, int64_t N, const float* w, float* out, float* lse,
                std::integer_sequence<int, J...>) {
  Vec top = fill(-INFINITY), total = fill(0.0f), acc[D] = {};
  for (int64_t first = 0; first < N; first += CHUNK) {
    const int64_t count = std::min(CHUNK, N - first);
    const T* token = x + first * stride_n;
    Vec score[CHUNK], old_top = top;
    for (int64_t t = 0; t < count; ++t) {
      score[t] = scores<D>(token + t * stride_n, w);
      top = maximum(score[t], top);
    }
    Vec keep = exp_nonpositive(old_top - top);
    total *= keep;
    ((acc[J] *= spread<D, J>(keep, Lanes())), ...);
    for (int64_t t = 0; t < count; ++t) {
      prefetch<D>(token + (t + CHUNK) * stride_n);
      Vec e = exp_nonpositive(score[t] - top);
      total += e;
      ((acc[J] += spread<D, J>(e, Lanes()) * load(token + t * stride_n + J * LANES)), ...);
    }
  }
  (store(out + J * LANES, acc[J] / spread<D, J>(total, Lanes())), ...);
  for (int i = 0; i < LANES; ++i) lse[i] = top[i] + std::log(total[i]);
}

template <class T>
inline float dot(const T* x, const float* w, int64_t D) {
  Vec sum = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) sum += load(x + d) * load(w + d);
  float result = 0;
  for (; d < D; ++d) result += to_float(x[d]) * w[d];
  for (int i = 0; i < LANES; ++i) result += sum[i];
  return result;
}

// out[d] = out[d] * keep + sum over the chunk's tokens of e[t] * x[t][d]
template <class T>
inline void accumulate(const T* x, int64_t stride_n, int64_t count, const float* e, float keep,
                       int64_t D, float* out) {
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    Vec sum = load(out + d) * keep;
    for (int64_t t = 0; t < count; ++t) sum += load(x + t * stride_n + d) * e[t];
    store(out + d, sum);
  }
  for (; d < D; ++d) {
    float sum = out[d] * keep;
    for (int64_t t = 0; t < count; ++t) sum += to_float(x[t * stride_n + d]) * e[t];
    out[d] = sum;
  }
}

// one head of any number of channels
template <class T>
void pool_head(const T* x, int64_t stride_n, int64_t N, int64_t D, const float* w, float* out,
               float* lse) {
  float top = -INFINITY, total = 0;
  std::fill(out, out + D, 0.0f);
  for (int64_t first = 0; first < N; first += CHUNK) {
    const int64_t count = std::min(CHUNK, N - first);
    const T* token = x + first * stride_n;
    float e[CHUNK], old_top = top;
    for (int64_t t = 0; t < count; ++t) {
      e[t] = dot(token + t * stride_n, w, D);
      top = e[t] > top ? e[t] : top;
    }
    std::fill(e + count, e + CHUNK, -INFINITY);
    for (int64_t t = 0; t < CHUNK; t += LANES) store(e + t, exp_nonpositive(load(e + t) - top));
    const float keep = exp_nonpositive(fill(old_top - top))[0];
    total *= keep;
    for (int64_t t = 0; t < count; ++t) total += e[t];
    accumulate(token, stride_n, count, e, keep, D, out);
  }
  for (int64_t d = 0; d < D; ++d) out[d] /= total;
  *lse = top + std::log(total);
}

template <int D, class T>
void pool_blocks(const T* x, int64_t stride_n, int64_t N, int64_t H, const float* w, float* out,
                 float* lse) {
  for (int64_t first = 0; first < H; first += LANES) {
    // the last block may overlap the one before it; it then computes the same numbers again
    const int64_t h = std::min(first, H - LANES), c = h * D;
    pool_block<D>(x + c, stride_n, N, w + c, out + c, lse + h,
                  std::make_integer_sequence<int, D>());
  }
}

template <class T>
void pool_heads(const T* x, int64_t stride_n, int64_t N, int64_t H, int64_t D, const float* w,
                float* out, float* lse) {
  if (H >= LANES) {
    switch (D) {
      case 1: return pool_blocks<1>(x, stride_n, N, H, w, out, lse);
      case 2: return pool_blocks<2>(x, stride_n, N, H, w, out, lse);
      case 4: return pool_blocks<4>(x, stride_n, N, H, w, out, lse);
      case 8: return pool_blocks<8>(x, stride_n, N, H, w, out, lse);
      case 16: return pool_blocks<16>(x, stride_n, N, H, w, out, lse);
    }
  }
  for (int64_t h = 0; h < H; ++h) {
    pool_head(x + h * D, stride_n, N, D, w + h * D, out + h * D, lse + h);
  }
}
