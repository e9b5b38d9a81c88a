// Rows of the caller's tensor to and from the transposed form of queries, PAD x PAD numbers at a time.
//
// Included once per instruction set.

// one of the two results of exchanging what differs in bit BIT of the lane and of the row
template <int BIT, bool UPPER, int... I>
inline Vec exchange(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return UPPER ? pick(a, b, std::integer_sequence<int, (I & BIT ? LANES + I : I + BIT)...>())
               : pick(a, b, std::integer_sequence<int, (I & BIT ? LANES + I - BIT : I)...>());
}

template <int BIT>
inline void transpose_bits(Vec* row) {
  if constexpr (BIT > 0) {
    using Lanes = std::make_integer_sequence<int, LANES>;
    UNROLL for (int r = 0; r < LANES; ++r) {
      if (r & BIT) continue;
      const Vec a = row[r], b = row[r + BIT];
      row[r] = exchange<BIT, false>(a, b, Lanes());
      row[r + BIT] = exchange<BIT, true>(a, b, Lanes());
    }
    transpose_bits<BIT / 2>(row);
  }
}

// to[c][i] = from[i * stride + c] * factor
void gather_block(const float* from, int64_t stride, float* const* to, float factor) {
  for (int i = 0; i < PAD; i += LANES) {
    for (int c = 0; c < PAD; c += LANES) {
      Vec row[LANES];
      UNROLL for (int r = 0; r < LANES; ++r) row[r] = load(from + (i + r) * stride + c) * factor;
      transpose_bits<LANES / 2>(row);
      UNROLL for (int r = 0; r < LANES; ++r) store(to[c + r] + i, row[r]);
    }
  }
}

// to[i * stride + c] = from[c][i] * factor
void scatter_block(const float* const* from, float* to, int64_t stride, float factor) {
  for (int i = 0; i < PAD; i += LANES) {
    for (int c = 0; c < PAD; c += LANES) {
      Vec row[LANES];
      UNROLL for (int r = 0; r < LANES; ++r) row[r] = load(from[c + r] + i) * factor;
      transpose_bits<LANES / 2>(row);
      UNROLL for (int r = 0; r < LANES; ++r) store(to + (i + r) * stride + c, row[r]);
    }
  }
}
