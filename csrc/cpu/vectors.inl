// Vectors of LANES floats and what all kernels do with them.
//
// Included once per instruction set, inside a namespace that defines LANES: how many floats one
// vector holds.

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));
using Lanes = std::make_integer_sequence<int, LANES>;

inline Vec fill(float value) { return Vec{} + value; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const Bfloat16* p) {
  HalfVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec)(__builtin_convertvector(bits, UintVec) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(Bfloat16* p, Vec v) {
  const UintVec bits = (UintVec)v;
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const HalfVec half = __builtin_convertvector(v == v ? rounded : UintVec{} + 0x7fc0, HalfVec);
  std::memcpy(p, &half, sizeof half);
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

template <int... I>
inline Vec pick(Vec a, Vec b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, IntVec{I...});
#endif
}

template <int... I>
inline Vec add_pairs(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return pick(a, b, std::integer_sequence<int, (2 * I)...>()) +
         pick(a, b, std::integer_sequence<int, (2 * I + 1)...>());
}
