// The functions of vectors that attention needs. Included once per instruction set, after
// exp2.inl.

typedef uint64_t WideVec __attribute__((vector_size(4 * LANES)));

inline UintVec iota() {
  UintVec v;
  for (int i = 0; i < LANES; ++i) v[i] = i;
  return v;
}

// to[n] = the sum over the lanes of v[n]; N: a power of two
template <int N>
inline void store_sums(float* to, Vec* v) {
  if constexpr (N > LANES) {
    store_sums<LANES>(to, v);
    store_sums<N - LANES>(to + LANES, v + LANES);
  } else {
    UNROLL for (int n = N / 2; n > 0; n /= 2) {
      UNROLL for (int i = 0; i < n; ++i) v[i] = add_pairs(v[2 * i], v[2 * i + 1], Lanes());
    }
    UNROLL for (int n = N; n < LANES; n *= 2) v[0] = add_pairs(v[0], v[0], Lanes());
    std::memcpy(to, v, N * sizeof(float));
  }
}

#ifdef LSMHA_AVX512
// 2^x for |x| <= 126 to an ulp: a table of 2^(i/32) in two registers leaves |r| <= 1/64 to a
// polynomial of degree 2. 9 instructions, 3 of them on the multipliers; the polynomial above has 6
// there. An entry has i << 18 subtracted, so that adding the shifted index leaves n << 23.
struct Exp2 {
  Vec low, high;

  // written out: an implicit constructor would not be compiled for this instruction set
  Exp2() : low(load(exp2_table.value)), high(load(exp2_table.value + LANES)) {}

  inline Vec operator()(Vec x) const {
    const float round = 393216.0f;  // 1.5 * 2^18: the low bits then hold 32 n + i
    const Vec shifted = x + round;
    const Vec r = x - (shifted - round);
    const __m512i bits = (__m512i)shifted;
    const IntVec entry = (IntVec)_mm512_permutex2var_ps((__m512)low, bits, (__m512)high);
    const Vec power = (Vec)(entry + ((IntVec)bits << 18));
    return power * r * (r * 2.402264976e-1f + 6.931573302e-1f) + power;
  }
};

// v where the bit of the lane is set, else 0
inline Vec where_kept(Vec v, const uint16_t* bits, int64_t) {
  return (Vec)_mm512_maskz_mov_ps(*bits, (__m512)v);
}

inline uint16_t not_below(UintVec a, UintVec b) {
  return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b);
}

// products of the low 32 bits of each 64
inline WideVec multiply_low(WideVec a, uint32_t b) {
  return (WideVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
#else
struct Exp2 {
  inline Vec operator()(Vec x) const { return exp2_by_polynomial(x); }
};

// v where the bit of the lane is set, else 0; lane is the first one's place among PAD
inline Vec where_kept(Vec v, const uint16_t* bits, int64_t lane) {
  const UintVec mine = (UintVec{} + 1) << iota();
  const UintVec all = UintVec{} + (static_cast<uint32_t>(*bits) >> lane);
  return (all & mine) != 0 ? v : Vec{};
}

inline uint16_t not_below(UintVec a, UintVec b) {
  const IntVec kept = a >= b;
#ifdef LSMHA_AVX2
  return static_cast<uint16_t>(_mm256_movemask_ps((__m256)kept));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(kept[i] & 1) << i;
  return static_cast<uint16_t>(bits);
#endif
}

inline WideVec multiply_low(WideVec a, uint32_t b) {
#ifdef LSMHA_AVX2
  return (WideVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffff) * b;
#endif
}
#endif

// the natural logarithm of x >= 2^-126; -inf for 0
inline Vec logarithm(Vec x) {
  const IntVec bits = (IntVec)x - 0x3f3504f3;  // sqrt(1/2): the mantissa lands in [1, 2) of it
  const Vec exponent = __builtin_convertvector(bits >> 23, Vec);
  const Vec m = (Vec)((bits & 0x7fffff) + 0x3f3504f3);
  const Vec f = (m - 1.0f) / (m + 1.0f), f2 = f * f;
  Vec series = f2 * 0.2222222222f + 0.2857142857f;
  series = series * f2 + 0.4f;
  series = series * f2 + 0.6666666667f;
  const Vec small = exponent * 1.42860677e-6f + (series * f2 * f + 2.0f * f);
  const Vec result = exponent * 0.693145752f + small;
  return x == 0.0f ? fill(-INFINITY) : x != x ? x : result;
}

// exp(-lse) = 2^-whole * rest, without the rounding of lse * log2(e); 1 for a row without keys
struct Normaliser {
  Vec whole, rest;

  explicit Normaliser(Vec lse) {
    const float round = 12582912.0f;
    lse = lse == -INFINITY ? Vec{} : lse;
    const Vec shifted = lse * 1.44269504f + round;
    whole = shifted - round;
    rest = exp2_any((whole * 0.693145752f - lse + whole * 1.42860677e-6f) * 1.44269504f);
  }
};
