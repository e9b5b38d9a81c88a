// lsmha_fast_C_cuda::attention and its gradient: tensors in, kernel arguments out. Outputs are
// given by the caller.

#include "attention.h"

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
using OptionalTensor = std::optional<Tensor>;

// one (B, H, N, D) tensor of the call
template <class Pointer>
attention::Rows<Pointer> rows(const Tensor& t, const Tensor& like, int64_t N, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                      t.scalar_type() == like.scalar_type() && t.dim() == 4 &&
                      t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(2) == N &&
                      t.size(3) == like.size(3) && (t.stride(3) == 1 || t.size(3) == 1),
                  name, " must be a CUDA tensor (B, H, N, D) like q with a dense last dimension");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
T* dense(const Tensor& t, ScalarType type, int64_t count, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                      t.scalar_type() == type && t.is_contiguous() && t.numel() == count,
                  name, " must be a contiguous CUDA tensor of ", count, " elements");
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

struct Options {
  const OptionalTensor &key_mask, &head_scale, &seed;
  int64_t threshold;
  double keep_factor, scale;
};

attention::Inputs inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                         const Options& options) {
  STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4 && k.dim() == 4,
                  "q, k must be CUDA tensors with 4 dims");
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), S = k.size(2), D = q.size(3);
  STD_TORCH_CHECK(q.numel() > 0 && S > 0 && D <= attention::kMaxHeadDim && B * H < 1 << 30 &&
                      L < 1 << 30 && S < 1 << 30,
                  "expected 1 to ", attention::kMaxHeadDim,
                  " channels and 1 to 2^30 of B H, L and S");
  attention::Inputs in{};
  in.q = rows<const void*>(q, q, L, "q");
  in.k = rows<const void*>(k, q, S, "k");
  in.v = rows<const void*>(v, q, S, "v");
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half ||
                      type == ScalarType::Float,
                  "q must be bfloat16, float16 or float32");
  in.type = type == ScalarType::BFloat16 ? attention::Type::Bf16
            : type == ScalarType::Half   ? attention::Type::Fp16
                                         : attention::Type::Fp32;
  if (options.key_mask) {
    const Tensor& mask = *options.key_mask;
    STD_TORCH_CHECK(mask.is_cuda() && mask.get_device_index() == q.get_device_index() &&
                        mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 &&
                        mask.size(0) == B && mask.size(1) == S,
                    "key_mask must be a CUDA bool tensor (B, S)");
    in.key_mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    in.mask_image = mask.stride(0), in.mask_key = mask.stride(1);
  }
  if (options.head_scale) {
    in.head_scale = dense<float>(*options.head_scale, ScalarType::Float, H, q, "head_scale");
  }
  if (options.seed) in.seed = dense<int64_t>(*options.seed, ScalarType::Long, 1, q, "seed");
  STD_TORCH_CHECK(!options.seed || (options.threshold >= 1 && options.threshold <= 65535),
                  "threshold must be 1 to 65535, got ", options.threshold);
  in.threshold = uint32_t(options.threshold);
  in.keep_factor = float(options.keep_factor);
  in.scale = float(options.scale);
  in.B = int32_t(B), in.H = int32_t(H), in.L = int32_t(L), in.S = int32_t(S), in.D = int32_t(D);
  return in;
}

void check(int error) {
  STD_TORCH_CHECK(error == cudaSuccess, "attention kernel not launched: ",
                  cudaGetErrorString(cudaError_t(error)));
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void forward(Tensor q, Tensor k, Tensor v, OptionalTensor key_mask, OptionalTensor head_scale,
             OptionalTensor seed, int64_t threshold, double keep_factor, double scale, Tensor o,
             Tensor lse) {
  attention::Forward call{};
  call.in = inputs(q, k, v, {key_mask, head_scale, seed, threshold, keep_factor, scale});
  const auto& in = call.in;
  call.o = rows<void*>(o, q, in.L, "o");
  call.lse = dense<float>(lse, ScalarType::Float, int64_t(in.B) * in.H * in.L, q, "lse");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  check(attention::launch_forward(call, current_stream(q)));
}

void backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, OptionalTensor key_mask,
              OptionalTensor head_scale, OptionalTensor seed, int64_t threshold,
              double keep_factor, double scale, Tensor o, Tensor lse, Tensor grad_q, Tensor grad_k,
              Tensor grad_v, OptionalTensor grad_head_scale) {
  attention::Backward call{};
  call.in = inputs(q, k, v, {key_mask, head_scale, seed, threshold, keep_factor, scale});
  const auto& in = call.in;
  call.o = rows<const void*>(o, q, in.L, "o");
  call.grad_o = rows<const void*>(grad_o, q, in.L, "grad_o");
  call.lse = dense<float>(lse, ScalarType::Float, int64_t(in.B) * in.H * in.L, q, "lse");
  call.grad_q = rows<void*>(grad_q, q, in.L, "grad_q");
  call.grad_k = rows<void*>(grad_k, q, in.S, "grad_k");
  call.grad_v = rows<void*>(grad_v, q, in.S, "grad_v");
  STD_TORCH_CHECK(grad_head_scale.has_value() == head_scale.has_value(),
                  "grad_head_scale must be given with head_scale, and only then");
  if (grad_head_scale) {
    call.grad_head_scale = dense<float>(*grad_head_scale, ScalarType::Float,
                                        int64_t(in.B) * in.H, q, "grad_head_scale");
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  std::optional<Tensor> sums;
  if (const int64_t bytes = attention::backward_sums(call)) {
    sums = torch::stable::new_empty(lse, {(bytes + 3) / 4});
    call.sums = static_cast<float*>(sums->mutable_data_ptr());
  }
  check(attention::launch_backward(call, current_stream(q)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C_cuda, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? head_scale,"
        " Tensor? seed, int threshold, float keep_factor, float scale, Tensor(a!) o,"
        " Tensor(b!) lse) -> ()");
  m.def("attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor? key_mask,"
        " Tensor? head_scale, Tensor? seed, int threshold, float keep_factor, float scale,"
        " Tensor o, Tensor lse, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v,"
        " Tensor(d!)? grad_head_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C_cuda, CUDA, m) {
  m.impl("attention", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}
