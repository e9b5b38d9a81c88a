// Powers of two. Included once per instruction set, after vectors.inl.

// 2^x for |x| <= 126 to about an ulp: 2^n times a polynomial on |r| <= 1/2 (minimax, degree 5)
inline Vec exp2_by_polynomial(Vec x) {
  const float round = 12582912.0f + 127.0f;  // 1.5 * 2^23: the low bits then hold n + 127
  const Vec shifted = x + round;
  const Vec r = x - (shifted - round);
  Vec p = r * 1.326472877e-3f + 9.671513183e-3f;
  p = p * r + 5.550733744e-2f;
  p = p * r + 2.402224208e-1f;
  p = p * r + 6.931469776e-1f;
  p = p * r + 1.0f;
  return p * (Vec)((IntVec)shifted << 23);
}

#ifdef LSMHA_AVX512
// 2^x for any x: 0 for -inf, and a NaN stays a NaN
inline Vec exp2_any(Vec x) {
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  Vec p = r * 1.867131686e-3f + 9.017026901e-3f;
  p = p * r + 5.579991555e-2f;
  p = p * r + 2.401644495e-1f;
  p = p * r + 6.931513119e-1f;
  p = p * r + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
// 2^x for any x <= 126: 0 below -126, and a NaN stays a NaN
inline Vec exp2_any(Vec x) {
  const Vec p = exp2_by_polynomial(x < -126.0f ? fill(-126.0f) : x);
  return x < -126.0f ? Vec{} : p;
}
#endif
