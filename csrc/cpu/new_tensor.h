// New CPU tensors, without the dispatcher: its way there takes longer than a small kernel.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

// the types of the stable ABI have hidden visibility
namespace {

torch::stable::Tensor new_strided(torch::headeronly::ScalarType dtype,
                                  std::initializer_list<int64_t> sizes, const int64_t* strides) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

// contiguous
[[maybe_unused]] torch::stable::Tensor new_tensor(torch::headeronly::ScalarType dtype,
                                                  std::initializer_list<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes.begin()[d]);
  }
  return new_strided(dtype, sizes, strides.data());
}

}  // namespace
