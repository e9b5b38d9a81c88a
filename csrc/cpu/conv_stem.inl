// Convolution, ReLU and max pooling of one image, one block of channels at a time.
//
// Included once per instruction set, after vectors.inl. Vectors run along the channels, so that tokens come out as they are stored.

typedef uint8_t ByteVec __attribute__((vector_size(LANES)));

// vectors of a block of channels, and sums at a time: as many accumulators as registers allow
constexpr int WIDTH = LANES == 16 ? 4 : 2;
constexpr int TILE = 4;
constexpr int64_t BLOCK = WIDTH * LANES;

inline IntVec load_codes(const uint8_t* p) {
  ByteVec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, IntVec);
}

inline void store_codes(uint8_t* p, IntVec codes) {
  const ByteVec bytes = __builtin_convertvector(codes, ByteVec);
  std::memcpy(p, &bytes, sizeof bytes);
}

// COUNT neighbouring sums of a block of channels
template <int COUNT>
inline void conv_tile(const float* patch, int64_t step, const std::vector<int64_t>& offsets,
                      const float* weight, float* sums) {
  Vec acc[COUNT][WIDTH] = {};
  for (const int64_t offset : offsets) {
    Vec w[WIDTH];
    for (int i = 0; i < WIDTH; ++i) w[i] = load(weight + i * LANES);
    weight += BLOCK;
    for (int p = 0; p < COUNT; ++p) {
      const Vec x = fill(patch[offset + p * step]);
      for (int i = 0; i < WIDTH; ++i) acc[p][i] += x * w[i];
    }
  }
  for (int p = 0; p < COUNT; ++p) {
    for (int i = 0; i < WIDTH; ++i) store(sums + p * BLOCK + i * LANES, acc[p][i]);
  }
}

inline void conv_row(const StemSizes& s, const float* image, int64_t y, const float* weight,
                     float* sums) {
  const int64_t step = s.conv.stride * s.CIN;
  const float* patch = image + y * s.conv.stride * s.pitch();
  if (s.WC < TILE) {
    for (int64_t x = 0; x < s.WC; ++x) {
      conv_tile<1>(patch + x * step, step, s.offsets, weight, sums + x * BLOCK);
    }
    return;
  }
  for (int64_t first = 0; first < s.WC; first += TILE) {
    // the last tile may overlap the one before it; it then computes the same numbers again
    const int64_t x = std::min(first, s.WC - TILE);
    conv_tile<TILE>(patch + x * step, step, s.offsets, weight, sums + x * BLOCK);
  }
}

// the largest sums of one window and the codes of the first of them
struct Winner {
  Vec value[WIDTH];
  IntVec code[WIDTH];
};

template <bool CODES>
inline Winner pool_window(const StemSizes& s, const float* rows, int64_t top, int64_t left) {
  const int64_t kernel = s.pool.kernel;
  const int64_t y0 = std::max<int64_t>(0, -top), y1 = std::min(kernel, s.HC - top);
  const int64_t x0 = std::max<int64_t>(0, -left), x1 = std::min(kernel, s.WC - left);
  Winner best;
  for (int i = 0; i < WIDTH; ++i) {
    best.value[i] = fill(-INFINITY);
    best.code[i] = IntVec{} + static_cast<int32_t>(y0 * kernel + x0);
  }
  for (int64_t y = y0; y < y1; ++y) {
    const float* sums = rows + ((top + y) % kernel * s.WC + left + x0) * BLOCK;
    for (int64_t x = x0; x < x1; ++x, sums += BLOCK) {
      const IntVec here = IntVec{} + static_cast<int32_t>(y * kernel + x);
      for (int i = 0; i < WIDTH; ++i) {
        const Vec v = load(sums + i * LANES);
        // a NaN wins over every number, and stays
        if (CODES) best.code[i] = v > best.value[i] ? here : (v == v ? best.code[i] : here);
        best.value[i] = v > best.value[i] ? v : (v == v ? best.value[i] : v);
      }
    }
  }
  return best;
}

// `count` numbers of a block, which may end in the middle of a vector
template <class T, class V, class Store>
inline void store_block(T* to, const V* values, int64_t count, Store put) {
  if (count >= BLOCK) {
    for (int i = 0; i < WIDTH; ++i) put(to + i * LANES, values[i]);
    return;
  }
  T block[BLOCK];
  for (int i = 0; i < WIDTH; ++i) put(block + i * LANES, values[i]);
  std::copy(block, block + count, to);
}

template <bool CODES, class T>
void pool_row(const StemSizes& s, const float* rows, const Vec* bias, int64_t y, int64_t first,
              T* out, uint8_t* codes) {
  const IntVec zero_code = IntVec{} + static_cast<int32_t>(s.pool.kernel * s.pool.kernel);
  for (int64_t x = 0; x < s.WO; ++x) {
    Winner best = pool_window<CODES>(s, rows, y * s.pool.stride - s.pool.padding,
                                     x * s.pool.stride - s.pool.padding);
    for (int i = 0; i < WIDTH; ++i) {
      const Vec v = best.value[i] + bias[i];
      best.value[i] = v <= 0.0f ? fill(0.0f) : v;
      if (CODES) best.code[i] = v <= 0.0f ? zero_code : best.code[i];
    }
    const int64_t token = (y * s.WO + x) * s.C + first;
    store_block(out + token, best.value, s.C - first, [](T* p, Vec v) { store(p, v); });
    if (CODES) store_block(codes + token, best.code, s.C - first, store_codes);
  }
}

template <class T>
void stem_forward(const StemSizes& s, const float* image, const float* weight, const float* bias,
                  int64_t first, float* rows, T* out, uint8_t* codes) {
  float block[BLOCK] = {};
  if (bias != nullptr) std::copy(bias + first, bias + std::min(first + BLOCK, s.C), block);
  Vec bias_block[WIDTH];
  for (int i = 0; i < WIDTH; ++i) bias_block[i] = load(block + i * LANES);
  int64_t ready = 0;  // rows of sums so far; each stands in place y % kernel
  for (int64_t y = 0; y < s.HO; ++y) {
    const int64_t top = y * s.pool.stride - s.pool.padding;
    ready = std::max(ready, top);  // rows between two windows are never read
    for (; ready < std::min(top + s.pool.kernel, s.HC); ++ready) {
      conv_row(s, image, ready, weight, rows + ready % s.pool.kernel * s.WC * BLOCK);
    }
    if (codes == nullptr) {
      pool_row<false>(s, rows, bias_block, y, first, out, codes);
    } else {
      pool_row<true>(s, rows, bias_block, y, first, out, codes);
    }
  }
}
