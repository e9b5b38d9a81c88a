// lsmha_fast_C::residual_norm and its gradient: results go to tensors that the caller made.

#include "residual_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// rows whose gradients are added one after another; fixed, so that no bit depends on the threads
constexpr int64_t CHUNK = 64;
// numbers below which another thread does not pay
constexpr int64_t GRAIN = 1 << 15;

enum class Access { Read, Write };

// a tensor that is only read must not look written: it may share its memory until it is
void* data_of(const Tensor& t, Access access) {
  return access == Access::Write ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
}

Rows rows_of(const Optional& t, const Tensor& x, Access access, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->numel() == x.numel() &&
                      t->size(t->dim() - 1) == x.size(x.dim() - 1) &&
                      (t->scalar_type() == ScalarType::Float ||
                       t->scalar_type() == ScalarType::BFloat16),
                  name, " must be contiguous (B, ..., C) like x, float32 or bfloat16");
  return {static_cast<char*>(data_of(*t, access)), t->scalar_type() == ScalarType::BFloat16};
}

float* floats_of(const Optional& t, int64_t numel, Access access, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->numel() == numel &&
                      t->scalar_type() == ScalarType::Float,
                  name, " must be contiguous float32 of ", numel, " numbers");
  return static_cast<float*>(data_of(*t, access));
}

// the numbers of t, or C times the other one, then zeros
std::vector<float> padded(const Optional& t, float other, int64_t C, int64_t length,
                          const char* name) {
  std::vector<float> values(length, 0.0f);
  const float* given = floats_of(t, C, Access::Read, name);
  if (given == nullptr) std::fill_n(values.begin(), C, other);
  else std::copy_n(given, C, values.begin());
  return values;
}

// what both passes have in common; the vectors are those that rows points to
struct Call {
  Call(const Tensor& x, const Optional& branch, const Optional& keep, const Optional& weight,
       const Optional& bias, const Tensor& mean, const Tensor& rstd, Access statistics,
       bool post_norm) {
    STD_TORCH_CHECK(x.dim() >= 2 && x.size(x.dim() - 1) > 0, "x must be (B, ..., C >= 1)");
    const int64_t C = x.size(x.dim() - 1), B = x.size(0), block = norm_kernels().block;
    count = x.numel() / C;
    length = (C + block - 1) / block * block;
    scale = padded(weight, 1.0f, C, length, "weight");
    shift = padded(bias, 0.0f, C, length, "bias");
    rows = {C,
            B == 0 ? 1 : count / B,
            post_norm,
            rows_of(x, x, Access::Read, "x"),
            rows_of(branch, x, Access::Read, "branch"),
            floats_of(keep, B, Access::Read, "keep"),
            scale.data(),
            shift.data(),
            floats_of(mean, count, statistics, "mean"),
            floats_of(rstd, count, statistics, "rstd")};
  }

  int64_t count, length;
  std::vector<float> scale, shift;
  NormRows rows;
};

void residual_norm(Tensor x, Optional branch, Optional keep, Optional weight, Optional bias,
                   double eps, bool post_norm, Optional stream, Tensor y, Tensor mean,
                   Tensor rstd) {
  const Call call(x, branch, keep, weight, bias, mean, rstd, Access::Write, post_norm);
  const NormResult result{rows_of(stream, x, Access::Write, "stream"),
                          rows_of(y, x, Access::Write, "y"), static_cast<float>(eps)};
  const int64_t grain = std::max<int64_t>(1, GRAIN / call.length);
  torch::stable::parallel_for(0, call.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(call.length);
    norm_kernels().forward(call.rows, result, begin, end, scratch.data());
  });
}

// out = the sum over the chunks of the C numbers at partial, each a stride after the one before it
void add_chunks(const float* partial, int64_t chunks, int64_t stride, int64_t C, float* out) {
  std::fill_n(out, C, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < C; ++c) out[c] += partial[chunk * stride + c];
  }
}

void residual_norm_backward(Tensor dy, Optional dstream, Tensor x, Optional branch, Optional keep,
                            Optional weight, Tensor mean, Tensor rstd, bool post_norm, Tensor dx,
                            Optional dbranch, Optional dweight, Optional dbias) {
  const Call call(x, branch, keep, weight, {}, mean, rstd, Access::Read, post_norm);
  const NormGradient whole{rows_of(dy, x, Access::Read, "dy"),
                           rows_of(dstream, x, Access::Read, "dstream"),
                           rows_of(dx, x, Access::Write, "dx"),
                           rows_of(dbranch, x, Access::Write, "dbranch"),
                           nullptr,
                           nullptr};
  const int64_t C = call.rows.C, length = call.length;
  float* weight_grad = floats_of(dweight, C, Access::Write, "dweight");
  float* bias_grad = floats_of(dbias, C, Access::Write, "dbias");
  const bool sums = weight_grad != nullptr && bias_grad != nullptr;
  const int64_t chunks = (call.count + CHUNK - 1) / CHUNK;
  std::vector<float> partial(sums ? chunks * 2 * length : 0);
  const int64_t grain = std::max<int64_t>(1, GRAIN / (CHUNK * length));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * length);
    NormGradient grad = whole;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (sums) {
        grad.dweight = partial.data() + chunk * 2 * length;
        grad.dbias = grad.dweight + length;
      }
      norm_kernels().backward(call.rows, grad, chunk * CHUNK,
                              std::min(call.count, (chunk + 1) * CHUNK), scratch.data());
    }
  });
  if (!sums) return;
  add_chunks(partial.data(), chunks, 2 * length, C, weight_grad);
  add_chunks(partial.data() + length, chunks, 2 * length, C, bias_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C, m) {
  m.def("residual_norm(Tensor x, Tensor? branch, Tensor? keep, Tensor? weight, Tensor? bias,"
        " float eps, bool post_norm, Tensor(a!)? stream, Tensor(b!) y, Tensor(c!) mean,"
        " Tensor(d!) rstd) -> ()");
  m.def("residual_norm_backward(Tensor dy, Tensor? dstream, Tensor x, Tensor? branch,"
        " Tensor? keep, Tensor? weight, Tensor mean, Tensor rstd, bool post_norm, Tensor(a!) dx,"
        " Tensor(b!)? dbranch, Tensor(c!)? dweight, Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C, CPU, m) {
  m.impl("residual_norm", TORCH_BOX(&residual_norm));
  m.impl("residual_norm_backward", TORCH_BOX(&residual_norm_backward));
}
