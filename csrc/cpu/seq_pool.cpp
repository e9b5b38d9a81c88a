// lsmha_fast::seq_pool and its gradient for the CPU, overloads `cpp`: softmax-weighted mean of the
// tokens, per head.

#include "new_tensor.h"
#include "pool_images.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// the kernels take any strides but need dense channels
Tensor readable(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return last < 0 || x.size(last) == 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// contiguous and fp32
Tensor exact(const Tensor& t) {
  const Tensor wide =
      t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

std::tuple<Tensor, Tensor> seq_pool(Tensor x, Tensor weight) {
  x = readable(x), weight = exact(weight);
  check_tokens(x, weight);
  const int64_t B = x.size(0), H = x.size(2), D = x.size(3);
  Tensor pooled = new_tensor(ScalarType::Float, {B, H, D});
  Tensor lse = new_tensor(ScalarType::Float, {B, H});
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

std::tuple<Tensor, Tensor> seq_pool_backward(Tensor out_grad, Tensor x, Tensor weight,
                                             Tensor pooled, Tensor lse) {
  const ScalarType dtype = weight.scalar_type();
  x = readable(x), weight = exact(weight), out_grad = exact(out_grad);
  check_tokens(x, weight);
  for (const Tensor& t : {out_grad, pooled, lse}) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                        t.numel() == x.size(0) * x.size(2) * (t.dim() == 3 ? x.size(3) : 1),
                    "out_grad, pooled (B, H, D) and lse (B, H) must be contiguous float32");
  }
  const int64_t B = x.size(0), H = x.size(2), D = x.size(3);
  Tensor dx = new_tensor(x.scalar_type(), {B, x.size(1), H, D});
  Tensor partial = new_tensor(ScalarType::Float, {B, H, D});
  auto* run = x.scalar_type() == ScalarType::Float ? run_backward<float> : run_backward<Bfloat16>;
  run(x, weight.const_data_ptr<float>(), out_grad.const_data_ptr<float>(),
      pooled.const_data_ptr<float>(), lse.const_data_ptr<float>(), dx,
      partial.mutable_data_ptr<float>());
  // by image, added by torch
  const int64_t images[] = {0};
  const Tensor dweight = torch::stable::sum(partial, images);
  return {dx, dtype == ScalarType::Float ? dweight : torch::stable::to(dweight, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast, CPU, m) {
  m.impl("seq_pool.cpp", TORCH_BOX(&seq_pool));
  m.impl("seq_pool_backward.cpp", TORCH_BOX(&seq_pool_backward));
}
