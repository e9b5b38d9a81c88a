// lsmha_fast_C_cuda::conv_stem and the gradient of its weight: tensors in, kernel arguments out.
// Outputs are given by the caller.

#include "conv_stem.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

conv_stem::Sizes sizes(const Tensor& x, int64_t C) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4 && x.size(0) > 0 && x.size(0) < 1 << 30 &&
                      (type == ScalarType::BFloat16 || type == ScalarType::Half),
                  "x must be a bfloat16 or float16 CUDA tensor (B >= 1, CIN, H, W)");
  const int64_t CIN = x.size(1), H = x.size(2), W = x.size(3);
  STD_TORCH_CHECK(CIN >= 1 && CIN <= conv_stem::kMaxImageChannels && C % 8 == 0 && C >= 8 &&
                      C < 1 << 20 && H >= 1 && H < 1 << 16 && W >= 1 && W <= conv_stem::kMaxWidth,
                  "expected 1 to ", conv_stem::kMaxImageChannels, " channels of at most ",
                  conv_stem::kMaxWidth, " columns and a multiple of 8 filters");
  return {type == ScalarType::BFloat16 ? conv_stem::Type::Bf16 : conv_stem::Type::Fp16,
          int32_t(x.size(0)), int32_t(CIN), int32_t(H), int32_t(W), int32_t(C),
          int32_t((H + 1) / 2), int32_t((W + 1) / 2)};
}

conv_stem::Image image(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <class T>
T* dense(const Tensor& t, ScalarType type, int64_t count, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                      t.scalar_type() == type && t.is_contiguous() && t.numel() == count,
                  name, " must be a contiguous CUDA tensor of ", count, " elements");
  void* data = const_cast<void*>(t.const_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0 || count % 8 != 0 ||
                      type == ScalarType::Float,
                  name, " must start at a multiple of 16 bytes");
  return static_cast<T*>(data);
}

void check(int error) {
  STD_TORCH_CHECK(error == cudaSuccess, "conv stem kernel not launched: ",
                  cudaGetErrorString(cudaError_t(error)));
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out,
             std::optional<Tensor> codes) {
  conv_stem::Forward call{};
  const int64_t C = weight.size(0);
  const auto& s = call.sizes = sizes(x, C);
  const ScalarType type = x.scalar_type();
  const int64_t count = int64_t(s.B) * s.HO * s.WO * C;
  call.x = image(x);
  call.weight = dense<void>(weight, type, C * s.CIN * 9, x, "weight");
  call.bias = bias ? dense<void>(*bias, type, C, x, "bias") : nullptr;
  call.out = dense<void>(out, type, count, x, "out");
  call.codes = codes ? dense<uint8_t>(*codes, ScalarType::Byte, count, x, "codes") : nullptr;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check(conv_stem::launch_forward(call, current_stream(x)));
}

void dweight(Tensor out_grad, Tensor x, Tensor codes, Tensor sums) {
  conv_stem::Backward call{};
  STD_TORCH_CHECK(out_grad.dim() == 3 && sums.dim() == 3 && sums.size(0) > 0,
                  "expected out_grad (B, N, C) and sums (shares, C, ", conv_stem::kColumns, ")");
  const int64_t C = out_grad.size(2), shares = sums.size(0);
  const auto& s = call.sizes = sizes(x, C);
  const int64_t count = int64_t(s.B) * s.HO * s.WO * C;
  call.x = image(x);
  call.out_grad = dense<void>(out_grad, x.scalar_type(), count, x, "out_grad");
  call.codes = dense<uint8_t>(codes, ScalarType::Byte, count, x, "codes");
  call.sums = dense<float>(sums, ScalarType::Float, shares * C * conv_stem::kColumns, x, "sums");
  call.shares = int32_t(shares);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check(conv_stem::launch_backward(call, current_stream(x)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C_cuda, m) {
  m.def("conv_stem(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, Tensor(b!)? codes) -> ()");
  m.def("conv_stem_dweight(Tensor out_grad, Tensor x, Tensor codes, Tensor(a!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C_cuda, CUDA, m) {
  m.impl("conv_stem", TORCH_BOX(&forward));
  m.impl("conv_stem_dweight", TORCH_BOX(&dweight));
}
