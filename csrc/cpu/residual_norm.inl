// Rows of residual_norm.h, one at a time: a row stays in the first-level cache, padded with zeros.
//
// Included once per instruction set, after vectors.inl.

// sums that run side by side, so that none waits for the one before it
constexpr int WAYS = 4;
constexpr int64_t BLOCK = WAYS * LANES;

inline int64_t padded(int64_t C) { return (C + BLOCK - 1) / BLOCK * BLOCK; }

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  Vec v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = from_float<T>(v[i]);
}

inline float total(const Vec (&sums)[WAYS]) {
  Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int lanes = LANES; lanes > 1; lanes /= 2) sum = add_pairs(sum, sum, Lanes());
  return sum[0];
}

// out = f(a + factor * b), up to the end of the padding, where a and b are 0; b may be null
template <class A, class B, class F>
inline void gather_rows(const A* a, const B* b, float factor, int64_t C, float* out, const F& f) {
  int64_t c = 0;
  for (; c + LANES <= C; c += LANES) {
    store(out + c, f(b == nullptr ? load(a + c) : load(a + c) + load(b + c) * factor));
  }
  for (; c < padded(C); c += LANES) {
    const int64_t count = std::max<int64_t>(0, C - c);
    const Vec v = load_some(a + c, count);
    store(out + c, f(b == nullptr ? v : v + load_some(b + c, count) * factor));
  }
}

template <class A, class F>
inline void gather_sum(const A* a, const Rows& b, int64_t i, float factor, int64_t C, float* out,
                       const F& f) {
  if (b.bfloat16) return gather_rows(a, b.row<const Bfloat16>(i, C), factor, C, out, f);
  gather_rows(a, b ? b.row<const float>(i, C) : nullptr, factor, C, out, f);
}

// out = f(a + factor * b) of row i
template <class F>
inline void gather(const Rows& a, const Rows& b, int64_t i, float factor, int64_t C, float* out,
                   const F& f) {
  if (a.bfloat16) return gather_sum(a.row<const Bfloat16>(i, C), b, i, factor, C, out, f);
  gather_sum(a.row<const float>(i, C), b, i, factor, C, out, f);
}

inline Vec same(Vec v) { return v; }

// f gives the vector at a position
template <class T, class F>
inline void write_row(T* to, int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + LANES <= C; c += LANES) store(to + c, f(c));
  if (c < C) store_some(to + c, f(c), C - c);
}

template <class F>
inline void write(const Rows& to, int64_t i, int64_t C, const F& f) {
  if (!to) return;
  if (to.bfloat16) return write_row(to.row<Bfloat16>(i, C), C, f);
  write_row(to.row<float>(i, C), C, f);
}

// asks for a row early: six tensors in runs of a row are too many for the hardware to guess
template <int WRITE>
inline void prefetch(const Rows& rows, int64_t i, int64_t C) {
  if (!rows) return;
  const int64_t bytes = C * (rows.bfloat16 ? 2 : 4);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows.data + i * bytes + at, WRITE);
}

inline float factor_of(const NormRows& rows, int64_t i) {
  return rows.keep == nullptr ? 1.0f : rows.keep[i / rows.rows_per_sample];
}

void norm_forward(const NormRows& rows, const NormResult& result, int64_t first, int64_t last,
                  float* s) {
  const int64_t C = rows.C, P = padded(C);
  const float *weight = rows.weight, *bias = rows.bias;
  for (int64_t i = first; i < last; ++i) {
    gather(rows.x, rows.branch, i, factor_of(rows, i), C, s, same);
    if (!rows.post_norm && result.stream) {
      write(result.stream, i, C, [=](int64_t c) { return load(s + c); });
      // y is the norm of the stream as it is returned
      if (result.stream.bfloat16) gather(result.stream, Rows(), i, 1.0f, C, s, same);
    }
    Vec sums[WAYS] = {}, squares[WAYS] = {};
    for (int64_t c = 0; c < P; c += BLOCK) {
      for (int j = 0; j < WAYS; ++j) sums[j] += load(s + c + j * LANES);
    }
    const float mean = total(sums) / C;
    std::fill(s + C, s + P, mean);  // what is padding adds nothing
    for (int64_t c = 0; c < P; c += BLOCK) {
      for (int j = 0; j < WAYS; ++j) {
        const Vec d = load(s + c + j * LANES) - mean;
        squares[j] += d * d;
      }
    }
    const float rstd = 1.0f / std::sqrt(total(squares) / C + result.eps);
    const auto y = [=](int64_t c) {
      return (load(s + c) - mean) * rstd * load(weight + c) + load(bias + c);
    };
    write(result.y, i, C, y);
    if (rows.post_norm) write(result.stream, i, C, y);
    rows.mean[i] = mean, rows.rstd[i] = rstd;
  }
}

// n: the normalised row; g: the gradient of y, which becomes h = g * weight. Adds to dweight and
// dbias and gives the two sums that the gradient of a row needs.
inline void add_sums(float* g, const float* n, const float* weight, int64_t P, float* dweight,
                     float* dbias, float& sum_h, float& sum_hn) {
  Vec h_sums[WAYS] = {}, hn_sums[WAYS] = {};
  for (int64_t c = 0; c < P; c += BLOCK) {
    for (int j = 0; j < WAYS; ++j) {
      const int64_t k = c + j * LANES;
      const Vec dy = load(g + k), row = load(n + k), h = dy * load(weight + k);
      h_sums[j] += h;
      hn_sums[j] += h * row;
      store(g + k, h);
      if (dweight == nullptr) continue;
      store(dweight + k, load(dweight + k) + dy * row);
      store(dbias + k, load(dbias + k) + dy);
    }
  }
  sum_h = total(h_sums), sum_hn = total(hn_sums);
}

void norm_backward(const NormRows& rows, const NormGradient& grad, int64_t first, int64_t last,
                   float* n) {
  const int64_t C = rows.C, P = padded(C);
  float* g = n + P;
  for (int64_t i = first; i < last; ++i) {
    for (const Rows& t : {rows.x, rows.branch, grad.dy, grad.dstream}) prefetch<0>(t, i + 2, C);
    for (const Rows& t : {grad.dx, grad.dbranch}) prefetch<1>(t, i + 1, C);
    const float factor = factor_of(rows, i), mean = rows.mean[i], rstd = rows.rstd[i];
    gather(rows.x, rows.branch, i, factor, C, n, [=](Vec s) { return (s - mean) * rstd; });
    gather(grad.dy, rows.post_norm ? grad.dstream : Rows(), i, 1.0f, C, g, same);
    float sum_h, sum_hn;
    add_sums(g, n, rows.weight, P, grad.dweight, grad.dbias, sum_h, sum_hn);
    const float mean_h = sum_h / C, mean_hn = sum_hn / C;
    const auto through_norm = [=](int64_t c) {
      return (load(g + c) - mean_h - load(n + c) * mean_hn) * rstd;
    };
    if (rows.post_norm || !grad.dstream) {
      write(grad.dx, i, C, through_norm);
      write(grad.dbranch, i, C, [=](int64_t c) { return through_norm(c) * factor; });
      continue;
    }
    for (int64_t c = 0; c < P; c += LANES) store(g + c, through_norm(c));
    gather_sum(g, grad.dstream, i, 1.0f, C, g, same);
    write(grad.dx, i, C, [=](int64_t c) { return load(g + c); });
    write(grad.dbranch, i, C, [=](int64_t c) { return load(g + c) * factor; });
  }
}
