// Dropout's random bits, as keep_mask in reference.py defines them: Philox 4x32 with 7 rounds, call c
// of query i of a head serves eight keys. Included once per instruction set.

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

inline uint32_t high_half(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

// The four words of call c for LANES / 2 queries, in the low halves of 64-bit lanes. query: their
// numbers. Rounds 1 to 3 are unrolled: as long as only one counter differs between queries, half of
// the products are the same for all.
inline void philox(const Dropout& dropout, uint32_t c, WideVec query, WideVec words[4]) {
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = high_half(dropout.seed);
  uint64_t a = static_cast<uint64_t>(c) * PHILOX_M0;
  uint64_t b = static_cast<uint64_t>(dropout.head) * PHILOX_M1;
  WideVec c0 = query ^ static_cast<uint64_t>(high_half(b) ^ k0);
  const uint32_t second_c1 = static_cast<uint32_t>(b), second_c2 = high_half(a) ^ k1;
  const uint32_t second_c3 = static_cast<uint32_t>(a);

  k0 += PHILOX_W0, k1 += PHILOX_W1;
  WideVec wide_a = multiply_low(c0, PHILOX_M0);
  b = static_cast<uint64_t>(second_c2) * PHILOX_M1;
  const uint32_t third_c0 = high_half(b) ^ second_c1 ^ k0, third_c1 = static_cast<uint32_t>(b);
  WideVec c2 = (wide_a >> 32) ^ static_cast<uint64_t>(second_c3 ^ k1), c3 = wide_a;

  k0 += PHILOX_W0, k1 += PHILOX_W1;
  a = static_cast<uint64_t>(third_c0) * PHILOX_M0;
  WideVec wide_b = multiply_low(c2, PHILOX_M1);
  c0 = (wide_b >> 32) ^ static_cast<uint64_t>(third_c1 ^ k0);
  WideVec c1 = wide_b;
  c2 = c3 ^ static_cast<uint64_t>(high_half(a) ^ k1);
  c3 = WideVec{} + static_cast<uint32_t>(a);

  for (int round = 3; round < 7; ++round) {
    k0 += PHILOX_W0, k1 += PHILOX_W1;
    wide_a = multiply_low(c0, PHILOX_M0), wide_b = multiply_low(c2, PHILOX_M1);
    c0 = (wide_b >> 32) ^ c1 ^ static_cast<uint64_t>(k0), c1 = wide_b;
    c2 = (wide_a >> 32) ^ c3 ^ static_cast<uint64_t>(k1), c3 = wide_a;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// words[w][i]: word w of call c for query first + i
inline void philox_words(const Dropout& dropout, uint32_t c, uint32_t first, UintVec words[4]) {
  WideVec even, odd, even_words[4], odd_words[4];
  for (int i = 0; i < LANES / 2; ++i) even[i] = first + 2 * i;
  odd = even + 1;
  philox(dropout, c, even, even_words);
  philox(dropout, c, odd, odd_words);
  for (int w = 0; w < 4; ++w) {
    words[w] = (UintVec)((even_words[w] & 0xffffffff) | (odd_words[w] << 32));
  }
}

// Keys of one call that are in the list: (place among eight, row of the list)
void keep_of_call(const Dropout& dropout, uint32_t c, const int64_t* rows, int64_t padded_l,
                  uint16_t* keep) {
  const UintVec threshold = UintVec{} + (dropout.threshold << 16);
  const int64_t groups = padded_l / PAD;
  for (int64_t group = 0; group < groups; ++group) {
    uint16_t bits[8] = {};
    for (int lane = 0; lane < PAD; lane += LANES) {
      UintVec words[4];
      philox_words(dropout, c, static_cast<uint32_t>(group * PAD + lane), words);
      for (int w = 0; w < 4; ++w) {
        bits[2 * w] |= not_below(words[w] << 16, threshold) << lane;
        bits[2 * w + 1] |= not_below(words[w], threshold) << lane;
      }
    }
    for (int m = 0; m < 8; ++m) {
      if (rows[m] >= 0) keep[rows[m] * groups + group] = bits[m];
    }
  }
}

void keep_bits(const Dropout& dropout, const int64_t* index, int64_t S, int64_t padded_l,
               uint16_t* keep) {
  for (int64_t row = 0; row < S;) {
    const int64_t block = index[row] / 64;
    int64_t rows[8][8];  // [call][place]: row of the list, -1 where the key is masked
    std::fill(&rows[0][0], &rows[0][0] + 64, int64_t{-1});
    for (; row < S && index[row] / 64 == block; ++row) {
      const int64_t j = index[row] % 64;
      rows[j % 8][j / 8] = row;
    }
    for (int c = 0; c < 8; ++c) {
      const bool used = std::any_of(rows[c], rows[c] + 8, [](int64_t r) { return r >= 0; });
      const uint32_t call = static_cast<uint32_t>(block * 8 + c);
      if (used) keep_of_call(dropout, call, rows[c], padded_l, keep);
    }
  }
}
