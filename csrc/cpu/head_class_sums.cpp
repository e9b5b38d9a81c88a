// lsmha_fast_C::head_class_sums: class sums of every head's pooled vector, one pass over the tokens.
//
// Images are pooled in parallel, then each thread adds its own columns in batch order: no float is
// added in an order that depends on the number of threads.

#include "pool_heads.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// images whose pooled vectors wait for the second step: bounds the workspace to 1024 * H * D floats
constexpr int64_t SLAB = 1024;

// elements of x, or of the pooled vectors, below which another thread does not pay
constexpr int64_t GRAIN = 1 << 15;

template <class T>
void pool_images(PoolHeads<T> pool_heads, const Tensor& x, int64_t first, int64_t count,
                 const float* weight, float* pooled) {
  const int64_t N = x.size(1), H = x.size(2), D = x.size(3);
  const auto stride = x.strides();
  // heads that are not neighbours in memory are pooled one at a time
  const int64_t side_by_side = stride[2] == D ? H : 1;
  const T* data = static_cast<const T*>(x.const_data_ptr()) + first * stride[0];
  const int64_t grain = std::max<int64_t>(1, GRAIN / (N * H * D));
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t h = 0; h < H; h += side_by_side) {
        pool_heads(data + b * stride[0] + h * stride[2], stride[1], N, side_by_side, D,
                   weight + h * D, pooled + (b * H + h) * D);
      }
    }
  });
}

void add_in_batch_order(const float* pooled, const int64_t* labels, int64_t count, int64_t columns,
                        float* sums) {
  const int64_t grain = std::max<int64_t>(16, GRAIN / count);
  torch::stable::parallel_for(0, columns, grain, [=](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < count; ++b) {
      float* sum = sums + labels[b] * columns;
      const float* row = pooled + b * columns;
      for (int64_t c = begin; c < end; ++c) sum[c] += row[c];
    }
  });
}

void check(const Tensor& x, const Tensor& weight, const Tensor& labels, int64_t num_classes) {
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu() && labels.is_cpu(), "expected CPU tensors");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && (x.size(3) == 1 || x.stride(3) == 1),
                  "x must be (B, N >= 1, H, D) with a dense last dimension");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == x.size(2) && weight.size(1) == x.size(3) &&
                      weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
                  "weight must be a contiguous float32 (H, D)");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == x.size(0) &&
                      labels.scalar_type() == ScalarType::Long && labels.is_contiguous(),
                  "labels must be a contiguous int64 (B,)");
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < labels.size(0); ++b) {
    STD_TORCH_CHECK(label[b] >= 0 && label[b] < num_classes, "label ", label[b],
                    " is not in 0..", num_classes - 1);
  }
}

std::tuple<Tensor, Tensor> head_class_sums(Tensor x, Tensor weight, Tensor labels,
                                           int64_t num_classes) {
  check(x, weight, labels, num_classes);
  const int64_t B = x.size(0), columns = x.size(2) * x.size(3);
  Tensor sums = torch::stable::new_zeros(weight, {num_classes, x.size(2), x.size(3)});
  Tensor counts = torch::stable::new_zeros(labels, {num_classes});
  const int64_t* label = labels.const_data_ptr<int64_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b) ++count[label[b]];

  const float* w = weight.const_data_ptr<float>();
  std::vector<float> pooled(std::min(B, SLAB) * columns);
  for (int64_t first = 0; first < B && columns > 0; first += SLAB) {
    const int64_t images = std::min(SLAB, B - first);
    if (x.scalar_type() == ScalarType::Float) {
      pool_images(pool_heads_float32(), x, first, images, w, pooled.data());
    } else {
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be float32 or bfloat16");
      pool_images(pool_heads_bfloat16(), x, first, images, w, pooled.data());
    }
    add_in_batch_order(pooled.data(), label + first, images, columns,
                       sums.mutable_data_ptr<float>());
  }
  return {sums, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C, m) {
  m.def("head_class_sums(Tensor x, Tensor weight, Tensor labels, int num_classes) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C, CPU, m) {
  m.impl("head_class_sums", TORCH_BOX(&head_class_sums));
}
