// Host bodies of the warp's collectives and of the asynchronous copies.

#pragma once

#include <deque>

#include "numbers.h"
#include "shared.h"

namespace dev {

namespace host {

// in of every lane goes to act(in[32], out[32]), once all lanes are at this call
template <class In, class Out, class Act>
Out collective(const char* call, Site site, const In& in, Act) {
  struct Exchange {
    In in;
    Out out;
  } mine{in, {}};
  const Action action = [](void* const* arguments) {
    In all[kWarp];
    Out out[kWarp];
    for (int i = 0; i < kWarp; ++i) all[i] = static_cast<Exchange*>(arguments[i])->in;
    Act{}(all, out);
    for (int i = 0; i < kWarp; ++i) static_cast<Exchange*>(arguments[i])->out = out[i];
  };
  Scheduler::get().wait(State::AtWarp, call, site, action, &mine);
  return mine.out;
}

template <int A, int B>
struct Fragments {
  uint32_t a[A], b[B];
  float c[4];
};
struct Accumulator {
  float d[4];
};

// d = a @ b + c of a 16 x K by a K x 8 matrix, PER elements in a register. Products are exact;
// they are added to c in fp32, in the order of k. The device defines neither the order nor the
// rounding of these sums (it adds several products at once, cut off below the largest).
template <int K, int PER, int A, int B, class Value>
void multiply(const Fragments<A, B> (&in)[kWarp], Accumulator (&out)[kWarp], Value value) {
  float a[16][K], b[K][8];
  constexpr int HALF = 4 * PER;  // columns of a in one register of all lanes
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < A; ++r) {
      for (int e = 0; e < PER; ++e) {
        a[g + r % 2 * 8][r / 2 * HALF + PER * t + e] = value(in[lane].a[r], e);
      }
    }
    for (int r = 0; r < B; ++r) {
      for (int e = 0; e < PER; ++e) b[r * HALF + PER * t + e][g] = value(in[lane].b[r], e);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      float sum = in[lane].c[r];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      out[lane].d[r] = sum;
    }
  }
}

template <int K, int PER, int A, int B, class Value>
void mma(const char* call, Site site, float (&d)[4], const Fragments<A, B>& in, Value) {
  const Accumulator out = collective<Fragments<A, B>, Accumulator>(
      call, site, in, [](const Fragments<A, B>(&all)[kWarp], Accumulator(&sums)[kWarp]) {
        multiply<K, PER>(all, sums, Value{});
      });
  for (int r = 0; r < 4; ++r) d[r] = out.d[r];
}

template <class T>
struct HalfValue {
  float operator()(uint32_t bits, int e) const {
    return e ? unpack_hi<T>(bits) : unpack_lo<T>(bits);
  }
};
struct Tf32Value {
  float operator()(uint32_t bits, int) const { return bits_float(bits & ~0x1fffu); }
};

// an 8 x 8 matrix of 16-bit elements; lane holds (g, 2t) and (g, 2t+1)
struct Matrix {
  uint16_t at[8][8];
  uint32_t fragment(int lane, bool transposed) const {
    const int g = lane / 4, t = lane % 4 * 2;
    return transposed ? at[t][g] | uint32_t(at[t + 1][g]) << 16
                      : at[g][t] | uint32_t(at[g][t + 1]) << 16;
  }
};

template <int COUNT>
struct Registers {
  uint32_t r[COUNT];
};
struct Row {
  const void* address;
  Site site;
};

template <int COUNT, bool TRANSPOSED>
void ldmatrix(const char* call, Site site, uint32_t (&r)[COUNT], const void* row) {
  const auto loaded = collective<Row, Registers<COUNT>>(
      call, site, Row{row, site}, [](const Row(&rows)[kWarp], Registers<COUNT>(&out)[kWarp]) {
        SharedMemory& memory = SharedMemory::get();
        for (int j = 0; j < COUNT; ++j) {
          Matrix matrix;
          for (int i = 0; i < 8; ++i) {
            const Row& row = rows[8 * j + i];
            const uint32_t at = memory.offset(row.address, 16, 16, "ldmatrix", row.site);
            // any lane may be the one that reads
            memory.read(at, 16, row.site, true);
            std::memcpy(matrix.at[i], memory.at(at), 16);
          }
          for (int lane = 0; lane < kWarp; ++lane) {
            out[lane].r[j] = matrix.fragment(lane, TRANSPOSED);
          }
        }
      });
  std::memcpy(r, loaded.r, sizeof r);
}

template <class T>
struct Sent {
  T value;
  int lane;
  Site site;
};

template <class T>
T shuffle(const char* call, Site site, T x, int from) {
  return collective<Sent<T>, T>(call, site, Sent<T>{x, from, site},
                                [](const Sent<T>(&sent)[kWarp], T(&out)[kWarp]) {
                                  for (int i = 0; i < kWarp; ++i) {
                                    out[i] = sent[sent[i].lane & (kWarp - 1)].value;
                                  }
                                });
}

// the asynchronous copies of one thread
class Copies {
 public:
  static Copies& of_current() { return all()[size_t(current->index)]; }
  static void reset(unsigned threads) { all().assign(threads, Copies{}); }

  void issue(const char* what, void* shared, const void* global, uint32_t size, bool valid,
             Site site) {
    SharedMemory& memory = SharedMemory::get();
    Copy copy{memory.offset(shared, size, size, what, site), size, {}, site};
    if (valid && reinterpret_cast<uintptr_t>(global) % size) {
      fail("%s: the global address %p is not a multiple of %u (%s:%d)", what, global, size,
           site.file, site.line);
    }
    if (valid) std::memcpy(copy.data, global, size);
    memory.write(copy.offset, size, site, true);
    open_.push_back(copy);
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t left) {
    for (; groups_.size() > left; groups_.pop_front()) {
      for (const Copy& c : groups_.front()) {
        SharedMemory::get().arrive(c.offset, c.size, c.data, c.site);
      }
    }
  }
  void check_finished() const {
    for (const auto& group : groups_) {
      if (!group.empty()) fail("it returns while a cp_async (%s:%d) is under way",
                               group[0].site.file, group[0].site.line);
    }
    if (!open_.empty()) fail("it returns with a cp_async (%s:%d) that was never committed",
                             open_[0].site.file, open_[0].site.line);
  }

 private:
  struct Copy {
    uint32_t offset, size;
    unsigned char data[16];
    Site site;
  };
  static std::vector<Copies>& all() {
    static std::vector<Copies> copies;
    return copies;
  }
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

struct Nothing {};

}  // namespace host

template <class T>
void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4],
                host::Site site = host::Site::here()) {
  const host::Fragments<2, 1> in{{a[0], a[1]}, {b}, {c[0], c[1], c[2], c[3]}};
  host::mma<8, 2>("mma_16x8x8", site, d, in, host::HalfValue<T>{});
}
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 const float (&c)[4], host::Site site = host::Site::here()) {
  const host::Fragments<4, 2> in{
      {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  host::mma<16, 2>("mma_16x8x16", site, d, in, host::HalfValue<T>{});
}
inline void mma_tf32_16x8x4(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4],
                            host::Site site = host::Site::here()) {
  const host::Fragments<2, 1> in{{a[0], a[1]}, {b}, {c[0], c[1], c[2], c[3]}};
  host::mma<4, 1>("mma_tf32_16x8x4", site, d, in, host::Tf32Value{});
}
inline void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            const float (&c)[4], host::Site site = host::Site::here()) {
  const host::Fragments<4, 2> in{
      {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  host::mma<8, 1>("mma_tf32_16x8x8", site, d, in, host::Tf32Value{});
}

inline uint32_t movmatrix(uint32_t x, host::Site site = host::Site::here()) {
  return host::collective<uint32_t, uint32_t>(
      "movmatrix", site, x,
      [](const uint32_t(&in)[host::kWarp], uint32_t(&out)[host::kWarp]) {
        host::Matrix matrix;
        std::memcpy(matrix.at, in, sizeof matrix.at);  // lane 4g + t holds row g
        for (int i = 0; i < host::kWarp; ++i) out[i] = matrix.fragment(i, true);
      });
}

inline float shfl_xor(float x, int mask, host::Site site = host::Site::here()) {
  return host::shuffle("shfl_xor", site, x, host::current->lane() ^ mask);
}
inline uint32_t shfl_xor(uint32_t x, int mask, host::Site site = host::Site::here()) {
  return host::shuffle("shfl_xor", site, x, host::current->lane() ^ mask);
}
inline float shfl(float x, int lane, host::Site site = host::Site::here()) {
  return host::shuffle("shfl", site, x, lane);
}
inline uint32_t shfl(uint32_t x, int lane, host::Site site = host::Site::here()) {
  return host::shuffle("shfl", site, x, lane);
}

inline void warp_barrier(host::Site site = host::Site::here()) {
  host::collective<host::Nothing, host::Nothing>(
      "warp_barrier", site, {},
      [](const host::Nothing(&)[host::kWarp], host::Nothing(&)[host::kWarp]) {
        ++host::Scheduler::get().warp_epoch[size_t(host::current->warp())];
      });
}
inline void block_barrier(host::Site site = host::Site::here()) {
  host::Scheduler::get().wait(host::State::AtBlock, "block_barrier", site, nullptr, nullptr);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, host::Site site = host::Site::here()) {
  host::ldmatrix<4, false>("ldmatrix_x4", site, r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              host::Site site = host::Site::here()) {
  host::ldmatrix<4, true>("ldmatrix_x4_trans", site, r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, host::Site site = host::Site::here()) {
  host::ldmatrix<2, false>("ldmatrix_x2", site, r, row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                              host::Site site = host::Site::here()) {
  host::ldmatrix<2, true>("ldmatrix_x2_trans", site, r, row);
}

inline void cp_async16(void* shared, const void* global, bool valid,
                       host::Site site = host::Site::here()) {
  host::Copies::of_current().issue("cp_async16", shared, global, 16, valid, site);
}
inline void cp_async8(void* shared, const void* global, bool valid,
                      host::Site site = host::Site::here()) {
  host::Copies::of_current().issue("cp_async8", shared, global, 8, valid, site);
}
inline void cp_async4(void* shared, const void* global, bool valid,
                      host::Site site = host::Site::here()) {
  host::Copies::of_current().issue("cp_async4", shared, global, 4, valid, site);
}
inline void cp_async_commit() { host::Copies::of_current().commit(); }
template <int N>
void cp_async_wait() {
  host::Copies::of_current().wait(N);
}

}  // namespace dev
