// Forward kernel of attention for D <= 16.
//
// A block holds the keys and values of a few heads of one image in shared memory (a chunk of them
// where they do not fit) and each of its warps takes 32 queries of one head at a time. Scores leave
// the tensor cores in base 2 and become weights and operands of the second product without leaving
// their registers.
//
// Softmax needs no row maximum while 2^score stays in the range of floats: a tile is first computed
// without one, and its row sums tell whether that was sound. If not, the tile is computed again
// with exact maxima, and so are the later tiles of that warp.

#pragma once

#include "attention_fragments.cuh"

namespace attention {

constexpr int kForwardWarps = 4;
constexpr int kTile = 32;  // queries: two operands of 16
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNoKeys = -1e30f;  // shift of an empty sum: below any other, and no infinity

struct ForwardPlan {
  Forward call;
  float factor;         // of the logits, in base 2
  float keep_factor;    // 1 without dropout
  int32_t heads_shift;  // a block takes 2^heads_shift <= 4 heads, 4 / 2^heads_shift warps each
  int32_t chunk;        // keys in shared memory, a multiple of 64
  int32_t shared_words;
  int32_t tiles;        // of one head in a block
  bool whole_rows;      // k, v: D = kD and rows aligned for vectors
  bool query_pairs;     // q: D even and rows aligned for Pair
  bool output_pairs;    // o: the same
};

// sums of 16 queries over keys; index 0 is row g of the operand, 1 row g + 8
template <int kD>
struct Sums {
  float values[kD == 16 ? 2 : 1][4];  // of weights times values; one of 8 columns may be ones
  float ones[4];                      // of weights, where those columns have no room
  float shift[2];                     // weights are 2^(score - shift)
};

template <class T, int kD, bool kDropout, int kEmulated>
struct ForwardWarp {
  static constexpr bool kOnes = kDropout || kD > 4;
  static constexpr int kBlocks = kD == 16 ? 2 : 1;  // of 8 channels
  // of few channels and of large logits plain fp32 has errors so small that two parts show
  template <bool kExact>
  static constexpr bool kThree = kExact || kD == 4;
  // row sums in between show that no weight that matters left the range of the type
  static constexpr float kLeast = std::is_same_v<T, dev::Fp16> ? 0x1p-4f : 0x1p-24f;
  static constexpr float kMost = 0x1p24f;
  // the largest weight with exact maxima is 2^kHeadroom: fp16 has few numbers below 1
  static constexpr float kHeadroom = std::is_same_v<T, dev::Fp16> ? 15.f : 0.f;

  HeadMemory head;
  int D, lane;
  Philox philox = {};
  uint32_t addend = 0;
  float peak = 0.f;  // largest |score| that went to the polynomial

  // keys in `groups` groups of shared memory, the first of them key `begin`
  template <bool kExact>
  __device__ __forceinline__ void attend(Sums<kD> (&sums)[2], const Queries<T, kD> (&q)[2],
                                         int first_query, int begin, int groups) {
#pragma unroll
    for (int r = 0; r < 2; ++r) sums[r] = {};
    if constexpr (kExact) find_maxima(sums, q, groups);
    // four registers of their own: the compiler would otherwise gather them for every product
    float start[2][4] = {};
    if constexpr (kExact) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        start[i / 4][i % 4] = dev::shfl(-sums[i / 4].shift[i % 4 / 2], lane);
      }
    }
    KeyWords<T, kD> k;
    RestWords<T, kD> rests;
    ValueWords<T, kD> v[kBlocks], ones;
    if constexpr (kDropout) {
#pragma unroll 1
      for (int unit = 0; 2 * unit < groups; ++unit) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t words[2][2][4];
          philox((begin / 64 + unit) * 8 + lane % 4 * 2, first_query + 16 * r + lane / 4, words);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (2 * unit + half < groups) {
              load<kExact>(k, rests, v, ones, 2 * unit + half);
              add<kExact>(sums[r], q[r], k, rests, v, ones, start[r], words, half);
            }
          }
        }
      }
    } else {
      const uint32_t none[2][2][4] = {};
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        load<kExact>(k, rests, v, ones, group);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          add<kExact>(sums[r], q[r], k, rests, v, ones, start[r], none, 0);
        }
      }
    }
  }

  // sum of a row's weights; the lanes that share the row get the same
  __device__ __forceinline__ float weight_sum(const Sums<kD>& sums, int row) const {
    if constexpr (kD > 4) return sums.ones[2 * row];
    const float(&from)[4] = kOnes ? sums.ones : sums.values[0];
    return dev::shfl(from[2 * row + 1], lane | 3);  // column 7
  }

  // whether weights without a shift were sound, in every row of the warp
  __device__ __forceinline__ bool sound(const Sums<kD> (&sums)[2]) const {
    bool here = peak <= kPolynomialLimit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float sum = weight_sum(sums[i / 2], i % 2);
      here = here && sum >= kLeast && sum <= kMost;
    }
    uint32_t unsound = !here;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) unsound |= dev::shfl_xor(unsound, step);
    return !unsound;
  }

 private:
  template <bool kExact>
  __device__ __forceinline__ void load(KeyWords<T, kD>& k, RestWords<T, kD>& rests,
                                       ValueWords<T, kD> (&v)[kBlocks], ValueWords<T, kD>& ones,
                                       int group) const {
    load_keys<T, kD>(k, head, group, lane);
    if constexpr (kThree<kExact>) load_rests<T, kD>(rests, head, group, lane);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      // columns beyond D are ones, too: column 7 has to be at kD = 4
      const int row = min(lane / 4 + 8 * n, D);
      load_values<T, kD>(v[n], head, D, group, row, lane);
    }
    if constexpr (kD > 4) load_values<T, kD>(ones, head, D, group, D, lane);
  }

  // a score that is not a number becomes its row's maximum, and so the whole row's
  __device__ __forceinline__ void find_maxima(Sums<kD> (&sums)[2], const Queries<T, kD> (&q)[2],
                                              int groups) const {
    float most[2][2] = {{-kInfinity, -kInfinity}, {-kInfinity, -kInfinity}};
    const float zero[4] = {};
    const RestWords<T, kD> no_rests = {};
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      KeyWords<T, kD> k;
      load_keys<T, kD>(k, head, group, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = i % 2;
        float s[4];
        scores<T, kD, Terms::Coarse, false>(s, q[r], k, no_rests, i / 2, zero);
        most[r][0] = max_or_nan(most[r][0], max_or_nan(s[0], s[1]));
        most[r][1] = max_or_nan(most[r][1], max_or_nan(s[2], s[3]));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float m = most[i / 2][i % 2];
      m = max_or_nan(m, dev::shfl_xor(m, 1));
      m = max_or_nan(m, dev::shfl_xor(m, 2));
      sums[i / 2].shift[i % 2] = m - kHeadroom;
    }
  }

  template <bool kExact>
  __device__ __forceinline__ void weigh(float (&p)[2][4]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& x = p[e / 4][e % 4];
      // spread, so that both units are busy all the time
      if ((e + 1) * kEmulated / 8 > e * kEmulated / 8) {
        if constexpr (kExact) {
          x = fmaxf(x, -kPolynomialLimit);
        } else {
          peak = fmaxf(peak, fabsf(x));
        }
        x = exp2_polynomial(x);
      } else {
        x = dev::exp2(x);
      }
    }
  }

  // 16 queries and 32 keys; words: the random bits [row][column] of the 64 keys whose half this is
  template <bool kExact>
  __device__ __forceinline__ void add(Sums<kD>& sums, const Queries<T, kD>& q,
                                      const KeyWords<T, kD>& k, const RestWords<T, kD>& rests,
                                      const ValueWords<T, kD> (&v)[kBlocks],
                                      const ValueWords<T, kD>& ones, const float (&start)[4],
                                      const uint32_t (&words)[2][2][4], int half) {
    // tensor cores cut sums off where additions round them: fp32 wants short chains of products
    Sums<kD> part = {};
    Sums<kD>& to = kSingle<T> ? part : sums;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float p[2][4];
      constexpr Terms kTerms = kThree<kExact> ? Terms::Three : Terms::Two;
      scores<T, kD, kTerms, kExact>(p[0], q, k, rests, 2 * j, start);
      scores<T, kD, kTerms, kExact>(p[1], q, k, rests, 2 * j + 1, start);
      weigh<kExact>(p);
      Weights<T> weights(p);
      if constexpr (kOnes) multiply<T, kD, true>(to.ones, weights, kD == 4 ? v[0] : ones, j);
      if constexpr (kDropout) {
        uint32_t signs[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          signs[i / 2][i % 2] = keep_signs(words[i / 2][i % 2][2 * half + j], addend);
        }
        weights.drop(signs);
      }
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) multiply<T, kD>(to.values[n], weights, v[n], j);
    }
    if constexpr (kSingle<T>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) sums.values[n][i] += part.values[n][i];
        sums.ones[i] += part.ones[i];
      }
    }
  }
};

// add what later keys gave to what earlier ones did
template <int kD>
__device__ __forceinline__ void merge(Sums<kD>& all, const Sums<kD>& more) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float shift = fmaxf(all.shift[row], more.shift[row]);
    const float old = dev::exp2(all.shift[row] - shift), now = dev::exp2(more.shift[row] - shift);
    const auto blend = [&](float& a, float b) { a = a * old + b * now; };
#pragma unroll
    for (int i = 2 * row; i < 2 * row + 2; ++i) {
#pragma unroll
      for (int n = 0; n < (kD == 16 ? 2 : 1); ++n) blend(all.values[n][i], more.values[n][i]);
      blend(all.ones[i], more.ones[i]);
    }
    all.shift[row] = shift;
  }
}

// the first key from `begin` on, in `count`, that takes part; -1 if none does
__device__ __forceinline__ int first_key(const Inputs& in, int image, int begin, int count,
                                         int lane) {
  if (in.key_mask == nullptr) return begin;
  const uint8_t* mask = in.key_mask + image * in.mask_image;
  uint32_t found = ~0u;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) {
    if (mask[(begin + i) * in.mask_key]) {
      found = begin + i;
      break;
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) found = min(found, dev::shfl_xor(found, step));
  return int(found);
}

// keys and values begin, begin + 1, ... of the block's heads into shared memory
template <class T, int kD>
__device__ __forceinline__ void load_chunk(const ForwardPlan& plan,
                                           const dev::Shared<uint32_t>& words, int image,
                                           int first_head, int begin, int count, int substitute) {
  const Inputs& in = plan.call.in;
  const int groups = (count + kGroup - 1) / kGroup, heads = 1 << plan.heads_shift;
  const T* k = static_cast<const T*>(in.k.data) + image * in.k.image;
  const T* v = static_cast<const T*>(in.v.data) + image * in.v.image;
  const uint32_t head_words = Layout<T, kD>::head_words(in.D, groups);
#pragma unroll 1
  for (int i = threadIdx.x; i < groups * kGroup / 2 * heads; i += kForwardWarps * 32) {
    const int local = i & (heads - 1), h = first_head + local;
    if (h >= in.H) continue;
    const uint32_t start = local * head_words;
    const HeadMemory head{words, start, start + groups * Layout<T, kD>::kKeyGroup};
    const int key = i >> plan.heads_shift << 1;
    T values[2][kD];
    bool valid[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int64_t from = begin + key + e;
      valid[e] = key + e < count;
      if (valid[e] && in.key_mask != nullptr) {
        valid[e] = in.key_mask[image * in.mask_image + from * in.mask_key];
      }
      if (!valid[e]) from = substitute;
      T x[kD];
      load_row(x, k + h * in.k.head + from * in.k.row, in.D, plan.whole_rows);
      store_key<T, kD>(head, key + e, x, plan.factor);
      load_row(values[e], v + h * in.v.head + from * in.v.row, in.D, plan.whole_rows);
    }
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      if (c < in.D) {
        store_values<T, kD>(head, in.D, key, c, valid[0] ? values[0][c] : T{},
                            valid[1] ? values[1][c] : T{});
      }
    }
    const T one = dev::from_float<T>(1.f);
    store_values<T, kD>(head, in.D, key, in.D, valid[0] ? one : T{}, valid[1] ? one : T{});
  }
}

// the 32 queries of a tile; those beyond the last are computed like it and not written
template <class T, int kD>
__device__ __forceinline__ void load_queries(Queries<T, kD> (&q)[2], const ForwardPlan& plan,
                                             int image, int h, int query, int lane) {
  const Inputs& in = plan.call.in;
  const T* head = static_cast<const T*>(in.q.data) + image * in.q.image + h * in.q.head;
  const T* rows[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    rows[i / 2][i % 2] = head + min(query + 8 * i + lane / 4, in.L - 1) * in.q.row;
  }
  if (plan.query_pairs) {
    q[0].template load<true>(rows[0], in.D, lane);
    q[1].template load<true>(rows[1], in.D, lane);
  } else {
    q[0].template load<false>(rows[0], in.D, lane);
    q[1].template load<false>(rows[1], in.D, lane);
  }
}

template <class T>
__device__ __forceinline__ Pair<T> pack_pair(float a, float b) {
  if constexpr (kSingle<T>) {
    return make_uint2(dev::float_bits(a), dev::float_bits(b));
  } else {
    return dev::pack<T>(a, b);
  }
}

// write a tile
template <class T, int kD, class Warp>
__device__ __forceinline__ void store(const ForwardPlan& plan, const Warp& warp,
                                      const Sums<kD> (&sums)[2], int image, int h, int query) {
  const Forward& call = plan.call;
  const int g = warp.lane / 4, t = warp.lane % 4, left = call.in.L - query - g, D = call.in.D;
  float scale = plan.keep_factor;
  if (call.in.head_scale != nullptr) scale *= call.in.head_scale[h];
  T* to = static_cast<T*>(call.o.data) + image * call.o.image + h * call.o.head +
          (query + g) * call.o.row + 2 * t;
  float* lse = call.lse + (int64_t(image) * call.in.H + h) * call.in.L + query + g;
#pragma unroll
  for (int i = 0; i < 4; ++i, to += 8 * call.o.row) {
    const Sums<kD>& from = sums[i / 2];
    const int row = i % 2;
    const float sum = warp.weight_sum(from, row);
    float factor = dev::rcp(sum);
    if constexpr (kSingle<T>) factor = dev::fma(factor, dev::fma(-sum, factor, 1.f), factor);
    factor = sum == 0.f ? 0.f : factor * scale;
    const bool inside = 8 * i < left;
    // the logarithm of 0 is -inf, which a row without keys shall have
    if (inside && t == 0) lse[8 * i] = dev::fma(from.shift[row], kLn2, dev::log2(sum) * kLn2);
#pragma unroll
    for (int n = 0; n < Warp::kBlocks; ++n) {
      const int c = 8 * n + 2 * t;
      const float a = from.values[n][2 * row] * factor, b = from.values[n][2 * row + 1] * factor;
      if (plan.output_pairs) {
        if (inside && c < D) *reinterpret_cast<Pair<T>*>(to + 8 * n) = pack_pair<T>(a, b);
      } else {
        if (inside && c < D) to[8 * n] = dev::from_float<T>(a);
        if (inside && c + 1 < D) to[8 * n + 1] = dev::from_float<T>(b);
      }
    }
  }
}

// blocks of a multiprocessor that registers must leave room for: as many as spill nothing
constexpr int forward_blocks(int kD, bool dropout, bool single) {
  if (single ? kD == 16 || dropout : kD == 16 && dropout) return 2;
  return kD == 4 && !dropout ? 4 : 3;
}

// grid: images times groups of heads, parts of the queries
template <class T, int kD, bool kDropout, int kEmulated>
__global__ void
    __launch_bounds__(kForwardWarps * 32, forward_blocks(kD, kDropout, kSingle<T>))
        attention_forward(const ForwardPlan plan) {
  using Warp = ForwardWarp<T, kD, kDropout, kEmulated>;
  const Inputs& in = plan.call.in;
  const int heads = 1 << plan.heads_shift, head_groups = (in.H + heads - 1) >> plan.heads_shift;
  const int image = blockIdx.x / head_groups;
  const int first_head = blockIdx.x % head_groups << plan.heads_shift;
  const int warps = kForwardWarps >> plan.heads_shift;  // of one head
  const int local = threadIdx.x / 32 / warps, share = threadIdx.x / 32 % warps;
  const int h = first_head + local;

  const dev::Shared<uint32_t> memory(0, plan.shared_words);
  Warp warp{{memory, 0, 0}, in.D, int(threadIdx.x % 32)};
  if constexpr (kDropout) {
    const uint64_t seed = *in.seed;
    warp.philox = {{uint32_t(seed), uint32_t(seed >> 32)}, uint32_t(image * in.H + h)};
    warp.addend = keep_addend(in.threshold);
  }

  const bool whole = plan.chunk >= in.S;  // all keys at once
  bool loaded = false, exact = false;
  int substitute = 0;
  for (int turn = 0; turn < plan.tiles; turn += warps) {
    const int tile = blockIdx.y * plan.tiles + turn + share, query = tile * kTile;
    const bool busy = turn + share < plan.tiles && query < in.L && h < in.H;
    Queries<T, kD> q[2];
    if (busy) load_queries(q, plan, image, h, query, warp.lane);
    Sums<kD> all[2];
    for (int begin = 0; begin < in.S; begin += plan.chunk) {
      const int count = min(plan.chunk, in.S - begin), groups = (count + kGroup - 1) / kGroup;
      if (!loaded || !whole) {
        if (loaded) dev::block_barrier();
        substitute = first_key(in, image, begin, count, warp.lane);
        if (substitute >= 0) {
          load_chunk<T, kD>(plan, memory, image, first_head, begin, count, substitute);
        }
        dev::block_barrier();
        loaded = true;
      }
      if (!busy) continue;
      const uint32_t start = local * Layout<T, kD>::head_words(in.D, groups);
      warp.head = {memory, start, start + groups * Layout<T, kD>::kKeyGroup};
      Sums<kD> sums[2] = {};
      if (substitute < 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i / 2].shift[i % 2] = kNoKeys;
      } else {
        if (!exact) {
          warp.peak = 0.f;
          warp.template attend<false>(sums, q, query, begin, groups);
          exact = !warp.sound(sums);
        }
        if (exact) warp.template attend<true>(sums, q, query, begin, groups);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (begin == 0) {
          all[r] = sums[r];
        } else {
          merge(all[r], sums[r]);
        }
      }
    }
    if (busy) store<T, kD>(plan, warp, all, image, h, query);
  }
}

}  // namespace attention
