// What the lanes of a warp hold, word by word: operands read from shared memory, weights, dropout's
// masks. "what" chooses; test_attention_maps.py knows which element of which matrix each must be.

#include "attention_bwd_parts.cuh"
#include "attention_fragments.cuh"
#include "harness.h"

namespace {

using namespace attention;

template <int kCount>
void put(uint32_t*& to, const uint32_t (&words)[kCount]) {
  for (const uint32_t word : words) *to++ = word;
}

struct Call {
  uint32_t* words;  // (32, per lane)
  int64_t per_lane;
  const void* x;
  float factor;
  Inputs in;
  uint32_t head;
  int query, key;  // the first ones
};

uint32_t* of_lane(const Call& call) { return call.words + threadIdx.x * call.per_lane; }

// 32 keys x (32, kD), which are the values too, and the row of ones
template <class T, int kD>
void keys(const Call call) {
  using Lay = Layout<T, kD>;
  const int lane = threadIdx.x;
  const dev::Shared<uint32_t> memory(0, Lay::head_words(kD, 1));
  const HeadMemory head{memory, 0, Lay::kKeyGroup};
  const T* x = static_cast<const T*>(call.x);
  T row[kD];
  load_row(row, x + lane * kD, kD, false);
  store_key<T, kD>(head, lane, row, call.factor);
  if (lane < 16) {
    for (int c = 0; c < kD; ++c) {
      store_values<T, kD>(head, kD, 2 * lane, c, x[2 * lane * kD + c], x[(2 * lane + 1) * kD + c]);
    }
    const T one = dev::from_float<T>(1.f);
    store_values<T, kD>(head, kD, 2 * lane, kD, one, one);
  }
  dev::block_barrier();
  uint32_t* to = of_lane(call);
  KeyWords<T, kD> k;
  load_keys<T, kD>(k, head, 0, lane);
  put(to, k);
  if constexpr (kSingle<T>) {
    RestWords<T, kD> rests;
    load_rests<T, kD>(rests, head, 0, lane);
    put(to, rests);
  }
  for (int n = 0; n < (kD == 16 ? 2 : 1); ++n) {
    ValueWords<T, kD> v;
    load_values<T, kD>(v, head, kD, 0, min(lane / 4 + 8 * n, kD), lane);
    put(to, v);
  }
}

// 16 queries x (16, kD)
template <class T, int kD>
void queries(const Call call) {
  const T* x = static_cast<const T*>(call.x) + threadIdx.x / 4 * kD;
  const T* const rows[2] = {x, x + 8 * kD};
  Queries<T, kD> q;
  q.template load<false>(rows, kD, threadIdx.x);
  uint32_t* to = of_lane(call);
  put(to, q.high);
  if constexpr (kSingle<T>) put(to, q.low), put(to, q.rest);
}

// weights x (16, 16) fp32 in the layout of a product's result, then what dropout leaves of ones
template <class T, int>
void weights(const Call call) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float* x = static_cast<const float*>(call.x);
  float p[2][4], ones[2][4];
  for (int i = 0; i < 8; ++i) {
    p[i / 4][i % 4] = x[(g + i % 4 / 2 * 8) * 16 + i / 4 * 8 + 2 * t + i % 2];
    ones[i / 4][i % 4] = 1;
  }
  uint32_t* to = of_lane(call);
  put(to, Weights<T>(p).high);
  const auto seed = uint64_t(*call.in.seed);
  const Philox philox{{uint32_t(seed), uint32_t(seed >> 32)}, call.head};
  uint32_t random[2][2][4];
  philox(call.key / 64 * 8 + 2 * t, call.query + g, random);
  for (int word = 0; word < 4; ++word) {  // of 16 keys each
    uint32_t signs[2][2];
    for (int i = 0; i < 4; ++i) {
      signs[i / 2][i % 2] =
          keep_signs(random[i / 2][i % 2][word], keep_addend(call.in.threshold));
    }
    Weights<T> kept(ones);
    kept.drop(signs);
    put(to, kept.high);
  }
}

// panels x (2, 16, 8) of 16 bits, read in the four ways; then constants of 16 queries
void panels(const Call call) {
  const int lane = threadIdx.x;
  const auto* x = static_cast<const uint32_t*>(call.x) + lane * 4;
  bwd::store_panel(lane / 16 * 256, lane % 16, x[0], x[1], x[2], x[3]);
  if (lane < 16) bwd::store_twice(512, lane, float(lane));
  dev::block_barrier();
  const bwd::Strip strip(0);
  uint32_t* to = of_lane(call);
  uint32_t r[4], halves[2][2];
  dev::ldmatrix_x4(r, strip.panels(0, 256, 0));
  put(to, r);
  dev::ldmatrix_x4_trans(r, strip.panels(0, 256, 0));
  put(to, r);
  bwd::load_halves(halves, strip.halves(0, 256, 0));
  put(to, halves[0]), put(to, halves[1]);
  for (int i = 0; i < 2; ++i) {
    float quad[4];
    strip.quad(512, i, quad);
    for (const float value : quad) *to++ = dev::float_bits(value);
  }
}

// masks of two tiles of 16 queries
template <int kKeyTiles>
void backward_bits(const Call call) {
  uint32_t* to = of_lane(call);
  const bwd::TileBits bits(call.in, call.head, call.query, call.key);
  for (int tile = 0; tile < 2; ++tile) {
    uint32_t words[4][4];
    bits.draw<kKeyTiles>(tile, words);
    for (int m = 0; m < kKeyTiles; ++m) {
      uint32_t mask[4];
      bwd::TileBits::masks(words, m, mask);
      put(to, mask);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const harness::Arguments given(argc, argv);
  const auto& words = given.tensor("words");
  const auto& x = given.tensor("x");
  Inputs in{};
  in.seed = given.data_or_null<const int64_t>("seed");
  in.threshold = uint32_t(given.integer("threshold"));
  const Call call{words.data<uint32_t>(), words.size(1), x.data<const void>(),
                  float(given.number("factor")), in, uint32_t(given.integer("head")),
                  int(given.integer("query")), int(given.integer("key"))};
  const std::string what = given.text("what");
  const int64_t channels = given.integer("channels");
  const auto run = [&](auto* kernel) { dev::launch(1, 32, 16384, kernel, call); };
  if (what == "panels") return run(panels), 0;
  if (what == "backward_bits") {
    channels == 1 ? run(backward_bits<1>) : channels == 2 ? run(backward_bits<2>)
                                                          : run(backward_bits<4>);
    return 0;
  }
  harness::with_dtype(given.text("dtype"), [&](auto zero) {
    using T = decltype(zero);
    const auto of_width = [&](auto width) {
      constexpr int kD = decltype(width)::value;
      if (what == "keys") run(keys<T, kD>);
      if (what == "queries") run(queries<T, kD>);
      if (what == "weights") run(weights<T, kD>);
    };
    if (channels == 4) of_width(std::integral_constant<int, 4>{});
    if (channels == 8) of_width(std::integral_constant<int, 8>{});
    if (channels == 16) of_width(std::integral_constant<int, 16>{});
  });
}
