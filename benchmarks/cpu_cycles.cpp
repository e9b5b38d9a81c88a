// Clock cycles of attention's CPU kernels: one head of 256 tokens whose tensors stay in the cache.
// Prints a line per head dim: D, then cycles per 16 weights of forward, forward with dropout's bits
// already drawn, backward, and of drawing the bits.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>

#include "attention_kernels.h"

namespace {

constexpr int64_t N = 256;

double seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// the least of many times: nothing but the work itself is in it
template <class F>
double least_seconds(const F& f) {
  double least = 1e9;
  for (int round = 0; round < 400; ++round) {
    const double start = seconds();
    f();
    least = std::min(least, seconds() - start);
  }
  return least;
}

// of a chain of additions, each of which waits a cycle for the one before it
double cycles_per_second() {
  constexpr int64_t count = 1 << 20;
  const double least = least_seconds([] {
    uint64_t x = 1;
    for (int64_t i = 0; i < count; i += 8) {
      asm volatile("add %0, %0\n add %0, %0\n add %0, %0\n add %0, %0\n"
                   "add %0, %0\n add %0, %0\n add %0, %0\n add %0, %0\n" : "+r"(x));
    }
  });
  return count / least;
}

Scratch numbers(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Scratch x(count);
  for (int64_t i = 0; i < count; ++i) x.data()[i] = normal(random);
  return x;
}

void measure(int64_t D, double frequency) {
  std::mt19937 random(0);
  const AttentionKernels& kernels = attention_kernels();
  Scratch q = numbers(N * D, random), k = numbers(N * D, random), v = numbers(N * D, random);
  Scratch dout = numbers(N * D, random), rows = numbers(N * D, random);
  Scratch out(N * D), lse(N), delta(N), dq(N * D), dk(N * D), dv(N * D);
  std::vector<int64_t> index(N);
  for (int64_t j = 0; j < N; ++j) index[j] = j;
  for (int64_t i = 0; i < N * D; ++i) q.data()[i] /= float(D);
  AttentionHead head{N, N, D, N, q.data(), k.data(), v.data(), index.data()};
  head.unshifted = kernels.largest_logit(head) <= MAX_UNSHIFTED;
  head.keep_factor = head.head_scale = 1.0f, head.all_keys = N;
  AttentionHead dropped = head;
  std::vector<uint16_t> keep(N * N / PAD);
  dropped.keep = keep.data();
  AttentionGradient gradient{dout.data(), lse.data(), delta.data(), dq.data(), dk.data(), dv.data()};
  gradient.q_rows = gradient.dout_rows = rows.data();

  const double bits = least_seconds([&] {
    kernels.keep_bits({42, 0, 6554}, index.data(), N, N, keep.data());
  });
  const double forward = least_seconds([&] { kernels.forward(head, out.data(), lse.data()); });
  const double with_dropout =
      least_seconds([&] { kernels.forward(dropped, out.data(), lse.data()); });
  const double backward = least_seconds([&] { kernels.backward(head, gradient); });
  const double factor = frequency * 16 / (N * N);
  std::printf("%d %.1f %.1f %.1f %.1f\n", int(D), forward * factor, with_dropout * factor,
              backward * factor, bits * factor);
}

}  // namespace

int main() {
  const double frequency = cycles_per_second();
  std::printf("%.2f\n", frequency / 1e9);
  for (const int64_t D : {1, 2, 4, 8, 16, 32}) measure(D, frequency);
}
