// Attention of one head and its gradient in fp32, by the widest vectors that this processor has.
//
// Sixteen queries lie side by side in a vector ("transposed": one row per channel, padded with
// zeros to a multiple of PAD), keys and values are rows of channels. So nothing is reduced across a
// vector in the forward pass, and a masked key is simply not in the list.

#pragma once

#include <cstdint>
#include <vector>

// queries are padded to a multiple of this, the longest vector
constexpr int64_t PAD = 16;
// heads up to this wide keep all channels of a query in registers; wider ones are padded to PAD
constexpr int64_t MAX_FUSED = 8;
// |log2 weight| up to which exponentials need no shift: 2^64 times any number of keys fits a float
constexpr float MAX_UNSHIFTED = 64.0f;

// Floats that start where the longest vector may be loaded in one piece.
class Scratch {
 public:
  explicit Scratch(int64_t size) : blocks_((size + PAD - 1) / PAD) {}
  float* data() { return blocks_.data()->lanes; }

 private:
  struct alignas(64) Block {
    float lanes[PAD];
  };
  std::vector<Block> blocks_;
};

struct AttentionHead {
  int64_t L, S, D;   // D padded: 1, 2, 4, 8 or a multiple of PAD
  int64_t padded_l;  // L padded to a multiple of PAD
  const float* q;    // (D, padded_l), times scale * log2(e)
  const float* k;    // (S, D), zeros up to a multiple of PAD numbers
  const float* v;    // (S, D)
  const int64_t* index;  // (S,) of each key among those of the caller
  bool unshifted;        // no |log2 weight| exceeds MAX_UNSHIFTED
  const uint16_t* keep;  // (S, padded_l / PAD), one bit per query, or null without dropout
  float keep_factor;
  float head_scale;
  const float* bias;  // null, or the bias of query i and key j at i * bias_l + index[j] * bias_s
  int64_t bias_l, bias_s;
  int64_t all_keys;  // of the caller, with those that are masked
};

struct AttentionGradient {
  const float* dout;   // (D, padded_l)
  const float* lse;    // (padded_l,), natural logarithm
  const float* delta;  // (padded_l,): rowsum(dout * out)
  float* dq;           // (D, padded_l), to be multiplied by the scale
  float* dk;           // (S, D), to be multiplied by ln(2)
  float* dv;           // (S, D), to be multiplied by the head's scale
  float* dbias;        // null, or added to at i * dbias_l + index[j] * dbias_s
  int64_t dbias_l, dbias_s;
  // heads wider than MAX_FUSED also as rows: (padded_l, D)
  const float* q_rows;
  const float* dout_rows;
};

// the random bits of one head: see keep_mask in reference.py
struct Dropout {
  uint64_t seed;
  uint32_t head;
  uint32_t threshold;
};

struct AttentionKernels {
  // no finite |log2 weight| exceeds it: |q| |k| + |bias|, the largest of each
  float (*largest_logit)(const AttentionHead& head);
  // out (D, padded_l) and lse (padded_l,)
  void (*forward)(const AttentionHead& head, float* out, float* lse);
  void (*backward)(const AttentionHead& head, const AttentionGradient& grad);
  // as forward, but for the weights themselves, added to sum (S, padded_l); out may be null
  void (*add_weights)(const AttentionHead& head, float* out, float* lse, float* sum);
  // of the sum, whose gradient grad.dout is: dq, dk and dbias
  void (*weights_backward)(const AttentionHead& head, const AttentionGradient& grad);
  // fills keep (S, padded_l / PAD) for the keys index (S,), ascending
  void (*keep_bits)(const Dropout& dropout, const int64_t* index, int64_t S, int64_t padded_l,
                    uint16_t* keep);
  // PAD rows of PAD channels, stride apart, times factor: to[c][i], and from there back
  void (*gather_block)(const float* from, int64_t stride, float* const* to, float factor);
  void (*scatter_block)(const float* const* from, float* to, int64_t stride, float factor);
};

const AttentionKernels& attention_kernels();
