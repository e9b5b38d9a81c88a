// Products of rows with packed weights. Included once per instruction set, after exp2.inl, with ROWS
// and COLUMNS defined: how many rows and vectors of columns a product keeps in registers.

static_assert(PANEL == COLUMNS * LANES);

template <int M>
inline void add_products(const float* rows, const float* panel, int64_t in, Vec (&sum)[M][COLUMNS]) {
  for (int64_t k = 0; k < in; ++k, panel += PANEL) {
    Vec weight[COLUMNS];
    UNROLL for (int n = 0; n < COLUMNS; ++n) weight[n] = load(panel + n * LANES);
    UNROLL for (int m = 0; m < M; ++m) {
      const float x = rows[m * in + k];
      UNROLL for (int n = 0; n < COLUMNS; ++n) sum[m][n] += weight[n] * x;
    }
  }
}

#ifdef LSMHA_AVX512_BF16
template <int M>
inline void add_products(const Bfloat16* rows, const Bfloat16* panel, int64_t in,
                         Vec (&sum)[M][COLUMNS]) {
  for (int64_t k = 0; k < in; k += 2, panel += 2 * PANEL) {
    __m512bh weight[COLUMNS];
    std::memcpy(weight, panel, sizeof weight);
    UNROLL for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, rows + m * in + k, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      UNROLL for (int n = 0; n < COLUMNS; ++n) {
        sum[m][n] = (Vec)_mm512_dpbf16_ps((__m512)sum[m][n], x, weight[n]);
      }
    }
  }
}
#else
template <int M>
inline void add_products(const Bfloat16* rows, const Bfloat16* panel, int64_t in,
                         Vec (&sum)[M][COLUMNS]) {
  for (int64_t k = 0; k < in; k += 2, panel += 2 * PANEL) {
    UNROLL for (int n = 0; n < COLUMNS; ++n) {
      UintVec pairs;
      std::memcpy(&pairs, panel + 2 * n * LANES, sizeof pairs);
      const Vec even = (Vec)(pairs << 16), odd = (Vec)(pairs & 0xffff0000);
      UNROLL for (int m = 0; m < M; ++m) {
        const Bfloat16* x = rows + m * in + k;
        sum[m][n] += even * to_float(x[0]);
        sum[m][n] += odd * to_float(x[1]);
      }
    }
  }
}
#endif

// Calls put(row, column, sums) for every vector of M rows and one panel.
template <int M, class T, class Put>
inline void product_tile(const Dense<T>& dense, const T* rows, int64_t row, int64_t column,
                         const Put& put) {
  Vec sum[M][COLUMNS];
  UNROLL for (int n = 0; n < COLUMNS; ++n) {
    const Vec bias = load(dense.bias + column + n * LANES);
    UNROLL for (int m = 0; m < M; ++m) sum[m][n] = bias;
  }
  add_products<M>(rows + row * dense.in, dense.weight + column * dense.in, dense.in, sum);
  UNROLL for (int m = 0; m < M; ++m) {
    UNROLL for (int n = 0; n < COLUMNS; ++n) put(row + m, column + n * LANES, sum[m][n]);
  }
}

template <class T, class Put>
inline void for_tiles(const Dense<T>& dense, const T* rows, int64_t count, const Put& put) {
  for (int64_t column = 0; column < dense.out; column += PANEL) {
    int64_t row = 0;
    for (; row + ROWS <= count; row += ROWS) product_tile<ROWS>(dense, rows, row, column, put);
    for (; row < count; ++row) product_tile<1>(dense, rows, row, column, put);
  }
}

template <class T>
void product(const Dense<T>& dense, const T* rows, int64_t count, bool add, float* out) {
  for_tiles(dense, rows, count, [&](int64_t row, int64_t column, Vec v) {
    float* to = out + row * dense.out + column;
    if (column + LANES <= dense.out) return store(to, add ? load(to) + v : v);
    for (int64_t n = 0; column + n < dense.out; ++n) to[n] = add ? to[n] + v[n] : v[n];
  });
}

// x times the normal distribution function. Its tail is 2^(-x^2 log2(e) / 2) times a polynomial in
// 1 / (1 + 0.3 |x|), fitted so that the product is off by 7e-8 at most.
inline Vec gelu(Vec x) {
  const Vec size = maximum(x, -x), t = 1.0f / (size * 0.3f + 1.0f);
  Vec p = t * 3.499390174e-2f - 1.531741888e-1f;
  p = p * t + 1.967620881e-1f;
  p = p * t - 4.156985665e-2f;
  p = p * t + 1.196526527e-1f;
  p = p * t + 1.038235737e-1f;
  p = p * t + 1.197536589e-1f;
  p = p * t + 1.197658065e-1f;
  p = p * t - 7.627086631e-6f;
  const Vec tail = x * p * exp2_any(x * x * -0.7213475204f);
  return x > 0.0f ? x - tail : tail;
}

template <class T>
void gelu_product(const Dense<T>& dense, const T* rows, int64_t count, T* out) {
  const int64_t stride = whole_panels(dense.out);
  for_tiles(dense, rows, count, [&](int64_t row, int64_t column, Vec v) {
    store(out + row * stride + column, gelu(v));
  });
}

// the sum of f over the first whole vectors of C numbers
template <class F>
inline float sum_of_vectors(int64_t C, const F& f) {
  Vec total = {};
  for (int64_t c = 0; c + LANES <= C; c += LANES) total += f(c);
  float sum = 0.0f;
  for (int n = 0; n < LANES; ++n) sum += total[n];
  return sum;
}

template <class T>
void normalise(const Norm& norm, float* x, int64_t count, int64_t C, T* out, int64_t stride) {
  const int64_t whole = C / LANES * LANES;
  for (int64_t row = 0; row < count; ++row, x += C, out += stride) {
    float sum = sum_of_vectors(C, [=](int64_t c) { return load(x + c); });
    for (int64_t c = whole; c < C; ++c) sum += x[c];
    const float mean = sum / C;
    float squares = sum_of_vectors(C, [=](int64_t c) {
      const Vec d = load(x + c) - mean;
      return d * d;
    });
    for (int64_t c = whole; c < C; ++c) squares += (x[c] - mean) * (x[c] - mean);
    const float factor = 1.0f / std::sqrt(squares / C + norm.eps);
    for (int64_t c = 0; c < whole; c += LANES) {
      Vec v = (load(x + c) - mean) * factor;
      if (norm.weight) store(x + c, v = v * load(norm.weight + c) + load(norm.bias + c));
      store(out + c, v);
    }
    for (int64_t c = whole; c < C; ++c) {
      float v = (x[c] - mean) * factor;
      if (norm.weight) x[c] = v = v * norm.weight[c] + norm.bias[c];
      out[c] = from_float<T>(v);
    }
  }
}

template <class T>
void narrow(const float* x, int64_t count, int64_t C, T* out, int64_t stride) {
  for (int64_t row = 0; row < count; ++row, x += C, out += stride) {
    int64_t c = 0;
    for (; c + LANES <= C; c += LANES) store(out + c, load(x + c));
    for (; c < C; ++c) out[c] = from_float<T>(x[c]);
  }
}

template <class T>
void widen(const T* x, int64_t size, float* out) {
  int64_t c = 0;
  for (; c + LANES <= size; c += LANES) store(out + c, load(x + c));
  for (; c < size; ++c) out[c] = to_float(x[c]);
}

template <class T>
DenseKernels<T> dense_table() {
  return {product<T>, gelu_product<T>, normalise<T>, narrow<T>, widen<T>};
}
