// The pieces of attention's backward kernel in fp32.
//
// Products go through tf32 in three terms (high x high, high x low, low x high), which leaves the
// accuracy of fp32. Logits and dP, of which differences of nearly equal numbers follow, take two
// parts' fourth term and a third part: two hold 22 bits and a sign of fp32's 24. The tensor cores do
// not round sums as fp32 does, so chains of products are short and fp32 additions join them, and
// what is large meets the number that is subtracted first. In every contraction k = t stands for
// element 2t and k = t + 4 for 2t + 1: then results are left operands as they are.

#pragma once

#include "attention_bwd_parts.cuh"

namespace attention::bwd {

struct Split {
  uint32_t hi, lo, rest;
};

// more: what x lacks of the number
__device__ __forceinline__ Split split(float x, float more = 0.f) {
  const uint32_t hi = dev::to_tf32(x) & 0xffffe000u;  // the other bits are anything
  const float left = x - dev::bits_float(hi) + more;
  const uint32_t lo = dev::to_tf32(left) & 0xffffe000u;
  return {hi, lo, dev::float_bits(left - dev::bits_float(lo))};
}

// without the errors of rounding the factor and the product
__device__ __forceinline__ Split times_factor(float x, const Plan& plan) {
  const float product = x * plan.factor;
  return split(product, dev::fma(x, plan.factor, -product) + x * plan.factor_rest);
}

// a left or right operand in two parts
template <int kRegisters>
struct Operand {
  uint32_t hi[kRegisters], lo[kRegisters];

  __device__ __forceinline__ void set(int i, Split x) { hi[i] = x.hi, lo[i] = x.lo; }
};

// in three
template <int kRegisters>
struct Exact : Operand<kRegisters> {
  uint32_t rest[kRegisters];

  __device__ __forceinline__ void set(int i, Split x) {
    Operand<kRegisters>::set(i, x);
    rest[i] = x.rest;
  }
};

__device__ __forceinline__ void multiply_add(float (&d)[4], const Operand<4>& a,
                                             const Operand<2>& b) {
  dev::mma_tf32_16x8x8(d, a.lo, b.hi, d);
  dev::mma_tf32_16x8x8(d, a.hi, b.lo, d);
  dev::mma_tf32_16x8x8(d, a.hi, b.hi, d);
}

// what high x high leaves of the product
__device__ __forceinline__ void multiply_add_rest(float (&d)[4], const Exact<4>& a,
                                                  const Exact<2>& b) {
  dev::mma_tf32_16x8x8(d, a.rest, b.hi, d);
  dev::mma_tf32_16x8x8(d, a.hi, b.rest, d);
  dev::mma_tf32_16x8x8(d, a.lo, b.lo, d);
  dev::mma_tf32_16x8x8(d, a.lo, b.hi, d);
  dev::mma_tf32_16x8x8(d, a.hi, b.lo, d);
}

// an 8 x 8 block of a result, (g, 2t) and (g, 2t + 1), transposed
__device__ __forceinline__ void transpose(float x, float y, float& a, float& b) {
  const uint32_t bits[2] = {dev::float_bits(x), dev::float_bits(y)};
  const uint32_t low = dev::movmatrix(dev::byte_perm(bits[0], bits[1], 0x5410));
  const uint32_t high = dev::movmatrix(dev::byte_perm(bits[0], bits[1], 0x7632));
  a = dev::bits_float(dev::byte_perm(low, high, 0x5410));
  b = dev::bits_float(dev::byte_perm(low, high, 0x7632));
}

template <int kWidth, bool kDropout>
struct Single {
  using Type = float;
  // what the registers hold
  static constexpr int kKeys = 16, kQueries = 64;
  static constexpr int kKeyTiles = kKeys / 16, kPanels = kWidth / 8;
  static constexpr bool kSpare = false;
  static constexpr bool kScaled = false;
  static constexpr int kBlocks = 2;

  // one warp's strip in shared memory: rows of (high, low) per channel, 16 bytes apart so that
  // reading along and across them meets few equal banks; the third parts, for which bf16's 8 bits
  // are enough; row constants
  static constexpr int kRow = kWidth * 8 + 16, kRestRow = kWidth * 2;
  static constexpr int kQ = 0;  // q * scale * log2(e)
  static constexpr int kDo = kQueries * kRow;
  static constexpr int kQRest = 2 * kDo, kDoRest = kQRest + kQueries * kRestRow;
  static constexpr int kLse = kDoRest + kQueries * kRestRow, kDelta = kLse + kQueries * 8;
  static constexpr int kLseRest = kDelta + kQueries * 8;
  static constexpr int kStrip = kLseRest + kQueries * 8;

  __device__ static float k_factor(const Plan&) { return kLn2; }

  __device__ __forceinline__ static void stage(const Plan& plan, int64_t b, int h, int i, bool used,
                                               float, uint32_t strip, int row) {
    const float* q = token<float>(plan.call.in.q, b, h, i);
    const float* d_o = token<float>(plan.call.grad_o, b, h, i);
    const float* o = token<float>(plan.call.o, b, h, i);
    double delta = 0;  // differences of it and of products that are nearly equal follow
#pragma unroll
    for (int c = 0; c < kWidth; c += 2) {
      const float2 queries = load_pair(q, c, plan, used), grads = load_pair(d_o, c, plan, used);
      const float2 outputs = load_pair(o, c, plan, used);
      delta += double(grads.x) * outputs.x + double(grads.y) * outputs.y;
      const int at = row * kRow + 8 * c, rest_at = row * kRestRow + 2 * c;
      store_splits(strip + kQ + at, strip + kQRest + rest_at, times_factor(queries.x, plan),
                   times_factor(queries.y, plan));
      store_splits(strip + kDo + at, strip + kDoRest + rest_at, split(grads.x), split(grads.y));
    }
    const float lse = used ? plan.call.lse[(b * plan.call.in.H + h) * plan.call.in.L + i] : 0.f;
    const float product = -lse * kLog2e;
    store_twice(strip + kLseRest, row, dev::fma(-lse, kLog2e, -product) - lse * 1.92596299e-8f);
    store_twice(strip + kDelta, row, used ? float(-delta * inverse_factor(plan, h)) : 0.f);
  }

  struct Block : Sums<kKeyTiles, kPanels> {
    // left operands of S^T = K Q^T and dP^T = V dO^T; right ones of dQ += dS K, [m][r] of 8 keys
    Exact<4> k[kKeyTiles][kPanels], v[kKeyTiles][kPanels];
    Operand<2> k_right[kKeyTiles][2][kPanels];
    uint32_t used;  // bit 2m + r: key row 8r of tile m takes part

    // as Half::Block::load
    __device__ __forceinline__ void load(const Plan& plan, int64_t b, int h, int first, int other) {
      const Inputs& in = plan.call.in;
      const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      constexpr int kOctets = 2 * kKeyTiles;
      used = taking_part<kOctets>(in, b, first + g);
      const float *k_rows[kOctets], *v_rows[kOctets];
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        const int shown = used >> i & 1 ? first + 8 * i + g : max(other, 0);
        k_rows[i] = token<float>(in.k, b, h, shown), v_rows[i] = token<float>(in.v, b, h, shown);
      }
#pragma unroll
      for (int n = 0; n < kPanels; ++n) {
        float2 keys[kOctets], values[kOctets];
        load_pairs<float>(k_rows, 2 * t + 8 * n, plan, keys);
        load_pairs<float>(v_rows, 2 * t + 8 * n, plan, values);
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
          const int m = i / 2, r = i % 2;
          const bool valid = used >> i & 1;
          const float2 key = other < 0 ? float2{0, 0} : keys[i];
          const float2 value = valid ? values[i] : float2{0, 0};
          k[m][n].set(r, split(key.x)), k[m][n].set(r + 2, split(key.y));
          v[m][n].set(r, split(value.x)), v[m][n].set(r + 2, split(value.y));
          float even, odd;
          transpose(valid ? key.x : 0, valid ? key.y : 0, even, odd);
          k_right[m][r][n].set(0, split(even)), k_right[m][r][n].set(1, split(odd));
        }
      }
    }

    __device__ static bool holds_channels() { return true; }
    __device__ float2 value(int m, int n, int r) const {
      const auto whole = [&](int i) {
        const Exact<4>& x = v[m][n];
        return dev::bits_float(x.hi[i]) + (dev::bits_float(x.lo[i]) + dev::bits_float(x.rest[i]));
      };
      return {whole(r), whole(r + 2)};
    }
  };

  __device__ __forceinline__ static void visit(Block& block, const Strip& from, int tile,
                                               const TileBits& random, float (&dq)[kPanels][4]) {
    uint32_t words[4][4];
    if constexpr (kDropout) random.draw<kKeyTiles>(tile, words);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
      float dk[kPanels][4] = {}, dv[kPanels][4] = {};
      Operand<4> turned[2];  // dS of key octet r
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float s[4], from_delta[4], lse_rest[4], delta[4];
        from.quad(kLse, 2 * tile + n, s);
        from.quad(kLseRest, 2 * tile + n, lse_rest);
        from.quad(kDelta, 2 * tile + n, delta);
        Exact<2> q_b[kPanels], o_b[kPanels];
#pragma unroll
        for (int e = 0; e < 4; ++e) from_delta[e] = delta[e];
#pragma unroll
        for (int c = 0; c < kPanels; ++c) {
          const int octet = 16 * tile + 8 * n;
          load_along(from, octet, kQ + 64 * c, kQRest + 16 * c, q_b[c]);
          load_along(from, octet, kDo + 64 * c, kDoRest + 16 * c, o_b[c]);
          dev::mma_tf32_16x8x8(s, block.k[m][c].hi, q_b[c].hi, s);
          dev::mma_tf32_16x8x8(from_delta, block.v[m][c].hi, o_b[c].hi, from_delta);
        }
#pragma unroll
        for (int c = 0; c < kPanels; ++c) {
          multiply_add_rest(s, block.k[m][c], q_b[c]);
          multiply_add_rest(from_delta, block.v[m][c], o_b[c]);
        }
        Operand<4> p_left, ds_left;
        float ds[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // row g + 8 (e / 2), query 2t + e % 2
          const int register_of = e / 2 + e % 2 * 2;
          float p = dev::exp2(s[e] + lse_rest[e]);
          if constexpr (kDropout) {
            const bool keep = words[2 * n + e % 2][m] >> (e / 2 ? 31 : 15) & 1;
            ds[e] = p * (keep ? from_delta[e] : delta[e]);
            p = keep ? p : 0.f;
          } else {
            ds[e] = p * from_delta[e];
          }
          p_left.set(register_of, split(p));
          ds_left.set(register_of, split(ds[e]));
        }
#pragma unroll
        for (int c = 0; c < kPanels; ++c) {
          const uint32_t at = (16 * tile + 8 * n) * kRow + 64 * c;
          Operand<2> right;
          load_across(from, kDo + at, right);
          multiply_add(dv[c], p_left, right);
          load_across(from, kQ + at, right);
          multiply_add(dk[c], ds_left, right);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float even, odd;
          transpose(ds[2 * r], ds[2 * r + 1], even, odd);
          turned[r].set(n, split(even)), turned[r].set(n + 2, split(odd));
        }
      }
#pragma unroll
      for (int c = 0; c < kPanels; ++c) {
        float sum[4] = {};
        multiply_add(sum, turned[0], block.k_right[m][0][c]);
        multiply_add(sum, turned[1], block.k_right[m][1][c]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dq[c][e] += sum[e];
          block.dk[m][c][e] += dk[c][e];
          block.dv[m][c][e] += dv[c][e];
        }
      }
    }
  }

 private:
  __device__ __forceinline__ static void store_splits(uint32_t offset, uint32_t rest_offset,
                                                      Split a, Split b) {
    dev::store_shared(dev::Shared<uint32_t>(offset, 4), 0, uint4{a.hi, a.lo, b.hi, b.lo});
    dev::Shared<uint32_t>(rest_offset, 1)[0] =
        dev::pack<dev::Bf16>(dev::bits_float(a.rest), dev::bits_float(b.rest));
  }
  // channels 2t and 2t + 1 of query octet + g
  __device__ __forceinline__ static void load_along(const Strip& from, int octet, uint32_t offset,
                                                    uint32_t rest_offset, Exact<2>& x) {
    const int row = octet + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const dev::Shared<uint32_t> memory(from.start() + offset + row * kRow + 16 * t, 4);
    const uint4 parts = dev::load_shared<uint4>(memory, 0);
    const uint32_t rests =
        dev::Shared<uint32_t>(from.start() + rest_offset + row * kRestRow + 4 * t, 1)[0];
    x.set(0, {parts.x, parts.y, rests << 16}), x.set(1, {parts.z, parts.w, rests & 0xffff0000u});
  }
  // channel g of queries 2t and 2t + 1
  __device__ __forceinline__ static void load_across(const Strip& from, uint32_t offset,
                                                     Operand<2>& x) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t at = from.start() + offset + (2 * t + j) * kRow + 8 * g;
      const uint2 parts = dev::load_shared<uint2>(dev::Shared<uint32_t>(at, 2), 0);
      x.set(j, {parts.x, parts.y, 0});
    }
  }
};

}  // namespace attention::bwd
