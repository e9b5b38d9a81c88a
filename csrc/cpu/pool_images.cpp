#include "pool_images.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void pool(const Tensor& x, int64_t first, int64_t count, const float* weight, float* pooled,
          float* lse) {
  const auto& kernels = pool_kernels<T>();
  const int64_t N = x.size(1), H = x.size(2), D = x.size(3);
  const auto stride = x.strides();
  const T* data = static_cast<const T*>(x.const_data_ptr()) + first * stride[0];
  for_neighbours(x, count, [=, &kernels](int64_t b, int64_t h, int64_t heads) {
    kernels.forward(data + b * stride[0] + h * stride[2], stride[1], N, heads, D, weight + h * D,
                    pooled + (b * H + h) * D, lse + b * H + h);
  });
}

}  // namespace

void check_tokens(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "expected CPU tensors");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && (x.size(3) == 1 || x.stride(3) == 1),
                  "x must be (B, N >= 1, H, D) with a dense last dimension");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "x must be float32 or bfloat16");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == x.size(2) && weight.size(1) == x.size(3) &&
                      weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
                  "weight must be a contiguous float32 (H, D)");
}

void pool_images(const Tensor& x, int64_t first, int64_t count, const float* weight, float* pooled,
                 float* lse) {
  if (x.scalar_type() == ScalarType::Float) return pool<float>(x, first, count, weight, pooled, lse);
  pool<Bfloat16>(x, first, count, weight, pooled, lse);
}
