// lsmha_fast_C::head_class_sums: class sums of every head's pooled vector, one pass over the tokens.
//
// Images are pooled in parallel, then each thread adds its own columns in batch order: no float is
// added in an order that depends on the number of threads.

#include "pool_images.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// images whose pooled vectors wait for the second step: bounds the workspace to 1024 * H * D floats
constexpr int64_t SLAB = 1024;

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
  check_tokens(x, weight);
  STD_TORCH_CHECK(labels.is_cpu() && labels.dim() == 1 && labels.size(0) == x.size(0) &&
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
  std::vector<float> pooled(std::min(B, SLAB) * columns), lse(std::min(B, SLAB) * x.size(2));
  for (int64_t first = 0; first < B; first += SLAB) {
    const int64_t images = std::min(SLAB, B - first);
    pool_images(x, first, images, w, pooled.data(), lse.data());
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
