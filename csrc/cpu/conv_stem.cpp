// lsmha_fast::conv_stem for the CPU, overload `cpp`: convolution, ReLU, max pooling and the layout of
// tokens; and lsmha_fast_C::conv_stem_dweight and _dy, parts of its gradient.

#include "conv_stem.h"
#include "new_tensor.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// partial sums of the weight's gradient: images are added in groups, as many as this or fewer
constexpr int64_t GROUPS = 64;
// multiplications below which another thread does not pay
constexpr int64_t WORK = 1 << 18;

StemSizes sizes_of(const Tensor& x, int64_t C, int64_t kernel, int64_t stride, int64_t padding,
                   int64_t pool_kernel, int64_t pool_stride, int64_t pool_padding) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && (x.scalar_type() == ScalarType::Float ||
                                                 x.scalar_type() == ScalarType::BFloat16),
                  "x must be a float32 or bfloat16 CPU tensor (B, CIN, H, W)");
  StemSizes sizes(x.size(1), x.size(2), x.size(3), C, {kernel, stride, padding},
                  {pool_kernel, pool_stride, pool_padding});
  STD_TORCH_CHECK(sizes.padded_depth() <= MAX_PADDED_DEPTH && sizes.HO > 0 && sizes.WO > 0,
                  "a sum may add at most ", MAX_PADDED_DEPTH - 1, " products");
  return sizes;
}

void check(const Tensor& t, ScalarType dtype, int64_t numel, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() &&
                      t.numel() == numel,
                  what);
}

// one image of x, fp32, channels last, inside a border of zeros
class PaddedImage {
 public:
  PaddedImage(const StemSizes& sizes, const Tensor& x)
      : sizes_(sizes), stride_(x.strides().begin(), x.strides().end()),
        data_((sizes.H + 2 * sizes.conv.padding) * sizes.pitch() + IMAGE_SLACK) {}

  template <class T>
  const float* copy(const T* x, int64_t b) {
    if (b == image_) return data_.data();
    image_ = b;
    const StemSizes& s = sizes_;
    for (int64_t h = 0; h < s.H; ++h) {
      float* row = data_.data() + (h + s.conv.padding) * s.pitch() + s.conv.padding * s.CIN;
      for (int64_t c = 0; c < s.CIN; ++c) {
        const T* from = x + b * stride_[0] + c * stride_[1] + h * stride_[2];
        for (int64_t w = 0; w < s.W; ++w) row[w * s.CIN + c] = to_float(from[w * stride_[3]]);
      }
    }
    return data_.data();
  }

 private:
  const StemSizes& sizes_;
  std::vector<int64_t> stride_;
  std::vector<float> data_;
  int64_t image_ = -1;
};

// (C, CIN, kernel, kernel) -> blocks of (depth, block), channels last, zero past C
template <class T>
std::vector<float> blocks_of(const Tensor& weight, const StemSizes& s, int64_t block) {
  const auto stride = weight.strides();
  const T* data = static_cast<const T*>(weight.const_data_ptr());
  const int64_t kernel = s.conv.kernel, depth = s.depth();
  std::vector<float> packed((s.C + block - 1) / block * block * depth);
  for (int64_t c = 0; c < s.C; ++c) {
    float* to = packed.data() + c / block * block * depth + c % block;
    for (int64_t k = 0; k < depth; ++k, to += block) {
      const int64_t place = k / s.CIN, y = place / kernel, x = place % kernel;
      *to = to_float(data[c * stride[0] + k % s.CIN * stride[1] + y * stride[2] + x * stride[3]]);
    }
  }
  return packed;
}

template <class T>
void run_forward(const StemSizes& s, const Tensor& x, const Tensor& weight, const float* bias,
                 Tensor& out, uint8_t* codes) {
  const auto& kernels = stem_kernels<T>();
  const int64_t block = kernels.block, blocks = (s.C + block - 1) / block;
  const std::vector<float> packed = blocks_of<T>(weight, s, block);
  const T* data = static_cast<const T*>(x.const_data_ptr());
  T* out_data = static_cast<T*>(out.mutable_data_ptr());
  const int64_t work = s.HC * s.WC * s.depth() * block, image_size = s.HO * s.WO * s.C;
  const int64_t grain = std::max<int64_t>(1, WORK / work);
  torch::stable::parallel_for(0, x.size(0) * blocks, grain, [&](int64_t begin, int64_t end) {
    PaddedImage image(s, x);
    std::vector<float> rows(s.pool.kernel * s.WC * block);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, first = item % blocks * block;
      kernels.forward(s, image.copy(data, b), packed.data() + first * s.depth(), bias, first,
                      rows.data(), out_data + b * image_size,
                      codes == nullptr ? nullptr : codes + b * image_size);
    }
  });
}

// weight: (C, CIN, kernel, kernel) -> tokens (B, N, C) and codes, which are empty unless needed
std::tuple<Tensor, Tensor> conv_stem(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                     int64_t stride, int64_t padding, std::vector<int64_t> pool,
                                     bool need_codes) {
  STD_TORCH_CHECK(pool.size() == 3, "pool must be kernel, stride and padding");
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && weight.size(2) == weight.size(3) &&
                      weight.scalar_type() == x.scalar_type(),
                  "weight must be (C, CIN, kernel, kernel) in the dtype of x");
  const int64_t C = weight.size(0);
  const StemSizes sizes = sizes_of(x, C, weight.size(2), stride, padding, pool[0], pool[1], pool[2]);
  STD_TORCH_CHECK(weight.size(1) == sizes.CIN, "x and weight differ in channels");
  if (bias) {
    if (bias->scalar_type() != ScalarType::Float) bias = torch::stable::to(*bias, ScalarType::Float);
    bias = torch::stable::contiguous(*bias);
    check(*bias, ScalarType::Float, C, "bias must be (C,)");
  }
  const int64_t N = sizes.HO * sizes.WO, B = x.size(0);
  Tensor out = new_tensor(x.scalar_type(), {B, N, C});
  Tensor codes =
      need_codes ? new_tensor(ScalarType::Byte, {B, N, C}) : new_tensor(ScalarType::Byte, {0});
  auto* run = x.scalar_type() == ScalarType::Float ? run_forward<float> : run_forward<Bfloat16>;
  run(sizes, x, weight, bias ? bias->const_data_ptr<float>() : nullptr, out,
      need_codes ? codes.mutable_data_ptr<uint8_t>() : nullptr);
  return {out, codes};
}

template <class T>
void run_backward(const StemSizes& s, const Tensor& x, const Tensor& out_grad,
                  const uint8_t* codes, Tensor& partial) {
  const auto& kernels = stem_kernels<T>();
  const int64_t block = kernels.block, blocks = (s.C + block - 1) / block, B = x.size(0);
  const int64_t groups = partial.size(0), image_size = s.HO * s.WO * s.C;
  const T* data = static_cast<const T*>(x.const_data_ptr());
  const T* grad = static_cast<const T*>(out_grad.const_data_ptr());
  float* sums = partial.mutable_data_ptr<float>();
  const int64_t work = s.HO * s.WO * s.padded_depth() * block * (groups > 0 ? B / groups : 1);
  const int64_t grain = std::max<int64_t>(1, WORK / work);
  torch::stable::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
    PaddedImage image(s, x);
    std::vector<float> patches(patch_floats(s));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / blocks, first = item % blocks * block;
      float* dw = sums + group * s.C * s.padded_depth();
      for (int64_t b = group * B / groups; b < (group + 1) * B / groups; ++b) {
        kernels.backward(s, image.copy(data, b), grad + b * image_size, codes + b * image_size,
                         first, patches.data(), dw);
      }
    }
  });
}

// sums: (C, padded depth), channels last, the bias after the weight; the rest means nothing
template <class T>
void arrange(const StemSizes& s, const Tensor& sums, Tensor& dweight, Tensor& dbias) {
  const float* from = sums.const_data_ptr<float>();
  T* weight = static_cast<T*>(dweight.mutable_data_ptr());
  T* bias = static_cast<T*>(dbias.mutable_data_ptr());
  const int64_t places = s.conv.kernel * s.conv.kernel;
  for (int64_t c = 0; c < s.C; ++c, from += s.padded_depth(), weight += s.depth()) {
    for (int64_t k = 0; k < s.depth(); ++k) {
      weight[k % s.CIN * places + k / s.CIN] = from_float<T>(from[k]);
    }
    bias[c] = from_float<T>(from[s.depth()]);
  }
}

// gradients of the weight (C, CIN, kernel, kernel) and the bias (C,)
std::tuple<Tensor, Tensor> conv_stem_dweight(Tensor out_grad, Tensor x, Tensor codes,
                                             int64_t kernel, int64_t stride, int64_t padding,
                                             int64_t pool_kernel, int64_t pool_stride,
                                             int64_t pool_padding) {
  const int64_t B = x.size(0), C = out_grad.size(2);
  const StemSizes sizes =
      sizes_of(x, C, kernel, stride, padding, pool_kernel, pool_stride, pool_padding);
  const int64_t numel = B * sizes.HO * sizes.WO * C;
  check(out_grad, x.scalar_type(), numel, "out_grad must be contiguous (B, N, C) like x");
  check(codes, ScalarType::Byte, numel, "codes must be contiguous uint8 (B, N, C)");
  Tensor partial = torch::stable::new_zeros(x, {std::min(B, GROUPS), C, sizes.padded_depth()},
                                            ScalarType::Float);
  const bool exact = x.scalar_type() == ScalarType::Float;
  (exact ? run_backward<float> : run_backward<Bfloat16>)(
      sizes, x, out_grad, codes.const_data_ptr<uint8_t>(), partial);
  const int64_t groups[] = {0};
  const Tensor sums = torch::stable::sum(partial, groups);
  Tensor dweight = new_tensor(x.scalar_type(), {C, sizes.CIN, kernel, kernel});
  Tensor dbias = new_tensor(x.scalar_type(), {C});
  (exact ? arrange<float> : arrange<Bfloat16>)(sizes, sums, dweight, dbias);
  return {dweight, dbias};
}

template <class T>
void run_scatter(const StemSizes& s, const Tensor& out_grad, const uint8_t* codes, Tensor& dy) {
  const auto& kernels = stem_kernels<T>();
  const int64_t block = kernels.block, blocks = (s.C + block - 1) / block;
  const int64_t image_size = s.HO * s.WO * s.C, plane_size = s.HC * s.WC * s.C;
  const T* grad = static_cast<const T*>(out_grad.const_data_ptr());
  float* to = dy.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, dy.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      std::fill_n(to + b * plane_size, plane_size, 0.0f);
      for (int64_t first = 0; first < blocks * block; first += block) {
        kernels.scatter(s, grad + b * image_size, codes + b * image_size, first,
                        to + b * plane_size);
      }
    }
  });
}

// Gradient of the sums, (B, HC, WC, C) fp32
Tensor conv_stem_dy(Tensor out_grad, Tensor x, Tensor codes, int64_t kernel, int64_t stride,
                    int64_t padding, int64_t pool_kernel, int64_t pool_stride,
                    int64_t pool_padding) {
  const int64_t B = x.size(0), C = out_grad.size(2);
  const StemSizes sizes =
      sizes_of(x, C, kernel, stride, padding, pool_kernel, pool_stride, pool_padding);
  const int64_t numel = B * sizes.HO * sizes.WO * C;
  check(out_grad, x.scalar_type(), numel, "out_grad must be contiguous (B, N, C) like x");
  check(codes, ScalarType::Byte, numel, "codes must be contiguous uint8 (B, N, C)");
  Tensor dy = new_tensor(ScalarType::Float, {B, sizes.HC, sizes.WC, C});
  auto* run = x.scalar_type() == ScalarType::Float ? run_scatter<float> : run_scatter<Bfloat16>;
  run(sizes, out_grad, codes.const_data_ptr<uint8_t>(), dy);
  return dy;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C, m) {
  m.def("conv_stem_dweight(Tensor out_grad, Tensor x, Tensor codes, int kernel, int stride, "
        "int padding, int pool_kernel, int pool_stride, int pool_padding) -> (Tensor, Tensor)");
  m.def("conv_stem_dy(Tensor out_grad, Tensor x, Tensor codes, int kernel, int stride, "
        "int padding, int pool_kernel, int pool_stride, int pool_padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C, CPU, m) {
  m.impl("conv_stem_dweight", TORCH_BOX(&conv_stem_dweight));
  m.impl("conv_stem_dy", TORCH_BOX(&conv_stem_dy));
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast, CPU, m) { m.impl("conv_stem.cpp", TORCH_BOX(&conv_stem)); }
