// Pooling of a batch of images in parallel: what seq_pool and head_class_sums share.

#pragma once

#include "pool_heads.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

// numbers below which another thread does not pay
constexpr int64_t GRAIN = 1 << 15;

// Raises unless the kernels may read x (B, N, H, D) and the fp32 weight (H, D).
void check_tokens(const torch::stable::Tensor& x, const torch::stable::Tensor& weight);

// Images first..first+count-1 of x -> pooled (count, H, D) and lse (count, H), fp32.
void pool_images(const torch::stable::Tensor& x, int64_t first, int64_t count, const float* weight,
                 float* pooled, float* lse);

// Calls f(b, h, heads) for the given images, in parallel, once per group of heads that are
// neighbours in memory: all H of them, or one at a time.
template <class F>
void for_neighbours(const torch::stable::Tensor& x, int64_t count, const F& f) {
  const int64_t N = x.size(1), H = x.size(2), D = x.size(3);
  if (H * D == 0) return;
  const int64_t heads = x.stride(2) == D ? H : 1;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (N * H * D));
  torch::stable::parallel_for(0, count, grain, [=, &f](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t h = 0; h < H; h += heads) f(b, h, heads);
    }
  });
}
