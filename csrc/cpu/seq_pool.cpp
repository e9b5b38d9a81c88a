// lsmha_fast_C::seq_pool and its gradient: softmax-weighted mean of the tokens, per head.

#include "pool_images.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> seq_pool(Tensor x, Tensor weight) {
  check_tokens(x, weight);
  const int64_t B = x.size(0), H = x.size(2), D = x.size(3);
  Tensor pooled = torch::stable::new_empty(weight, {B, H, D});
  Tensor lse = torch::stable::new_empty(weight, {B, H});
  pool_images(x, 0, B, weight.const_data_ptr<float>(), pooled.mutable_data_ptr<float>(),
              lse.mutable_data_ptr<float>());
  return {pooled, lse};
}

template <class T>
void run_backward(const Tensor& x, const float* weight, const float* out_grad, const float* pooled,
                  const float* lse, Tensor& dx, float* partial) {
  const auto& kernels = pool_kernels<T>();
  const int64_t N = x.size(1), H = x.size(2), D = x.size(3);
  const auto stride = x.strides();
  const T* data = static_cast<const T*>(x.const_data_ptr());
  T* dx_data = static_cast<T*>(dx.mutable_data_ptr());
  for_neighbours(x, x.size(0), [=, &kernels](int64_t b, int64_t h, int64_t heads) {
    const int64_t head = b * H + h;
    const PoolGradient<T> grad{out_grad + head * D, pooled + head * D, lse + head,
                               dx_data + (b * N * H + h) * D, H * D, partial + head * D};
    kernels.backward(data + b * stride[0] + h * stride[2], stride[1], N, heads, D, weight + h * D,
                     grad);
  });
}

// the gradient of the tokens, and that of the weight by image (B, H, D)
std::tuple<Tensor, Tensor> seq_pool_backward(Tensor out_grad, Tensor x, Tensor weight,
                                             Tensor pooled, Tensor lse) {
  check_tokens(x, weight);
  for (const Tensor& t : {out_grad, pooled, lse}) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                        t.numel() == x.size(0) * x.size(2) * (t.dim() == 3 ? x.size(3) : 1),
                    "out_grad, pooled (B, H, D) and lse (B, H) must be contiguous float32");
  }
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor partial = torch::stable::new_empty(pooled, pooled.sizes());
  auto* run = x.scalar_type() == ScalarType::Float ? run_backward<float> : run_backward<Bfloat16>;
  run(x, weight.const_data_ptr<float>(), out_grad.const_data_ptr<float>(),
      pooled.const_data_ptr<float>(), lse.const_data_ptr<float>(), dx,
      partial.mutable_data_ptr<float>());
  return {dx, partial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C, m) {
  m.def("seq_pool(Tensor x, Tensor weight) -> (Tensor, Tensor)");
  m.def("seq_pool_backward(Tensor out_grad, Tensor x, Tensor weight, Tensor pooled, Tensor lse)"
        " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C, CPU, m) {
  m.impl("seq_pool", TORCH_BOX(&seq_pool));
  m.impl("seq_pool_backward", TORCH_BOX(&seq_pool_backward));
}
