// What the host code and the kernels of attention share: the arguments of a call, already checked.

#pragma once

#include <cstdint>

namespace attention {

// (B, H, N, D) elements; strides count elements, the D channels of a row are dense
template <class Pointer>
struct Rows {
  Pointer data;
  int64_t image, head, row;
};
using InputRows = Rows<const void*>;
using OutputRows = Rows<void*>;

enum class Type { Bf16, Fp16, Fp32 };

struct Inputs {
  InputRows q, k, v;
  const uint8_t* key_mask;  // (B, S) with these strides, nonzero where a key takes part; or null
  int64_t mask_image, mask_key;
  const float* head_scale;  // (H,) or null
  const int64_t* seed;      // on the device; null without dropout
  uint32_t threshold;       // a weight whose 16 random bits are below is dropped; 1 to 65535
  float keep_factor;        // of the weights that are kept
  float scale;              // of the logits
  Type type;
  int32_t B, H, L, S, D;    // all >= 1, D <= kMaxHeadDim
};

constexpr int kMaxHeadDim = 16;

struct Forward {
  Inputs in;
  OutputRows o;  // like q
  float* lse;    // (B, H, L) dense, natural logarithm, -inf in rows without keys
};

struct Backward {
  Inputs in;
  InputRows o, grad_o;
  const float* lse;
  OutputRows grad_q, grad_k, grad_v;
  float* grad_head_scale;  // (B, H) dense: one share per image; or null
  float* sums;             // backward_sums(call) bytes on the device, unwritten; null where that is 0
};

// `stream` is a cudaStream_t of the current device; the result is a cudaError_t
int launch_forward(const Forward& call, void* stream);
int launch_backward(const Backward& call, void* stream);

// bytes that a call needs beside its tensors: 0 up to about a thousand queries
int64_t backward_sums(const Backward& call);

}  // namespace attention
