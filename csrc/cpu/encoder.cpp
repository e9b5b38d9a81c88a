// lsmha_fast_C::encoder: a whole transformer block of inference in one call.
//
// Rows are divided into slabs that stay in a core's cache from one product to the next; only
// attention needs the rows of other slabs. So a block is three parallel loops: norm and projection
// of slabs, attention of heads, and the rest of the block for slabs.

#include "attention_arguments.h"
#include "dense.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <new>

namespace {

// most rows of a slab: what a block holds of them (320 KB at 256 channels, fp32) fits a second-level
// cache beside a panel of weights
constexpr int64_t SLAB = 64;
// rows that a product takes at a time, with the widest vectors
constexpr int64_t ROUND = 8;
// rows per thread that go through the three loops at once; what a block keeps of them is bounded
constexpr int64_t ROWS_AT_ONCE = 256;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct EncoderWeights {
  Tensor qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias;
  Optional norm_weight, norm_bias;
};

struct EncoderSizes {
  int64_t N, C, H, D, hidden;  // hidden: in whole panels

  int64_t width() const { return H * D; }
};

// Rows as a product reads them: whole panels long, zeros past the numbers in use.
template <class T>
class PanelRows {
 public:
  PanelRows(int64_t rows, int64_t used)
      : stride(whole_panels(used)),
        memory_(static_cast<T*>(::operator new(rows * stride * sizeof(T), ALIGN))) {
    for (int64_t row = 0; used < stride && row < rows; ++row) {
      std::fill(data() + row * stride + used, data() + (row + 1) * stride, T{});
    }
  }

  T* data() { return memory_.get(); }

  const int64_t stride;

 private:
  static constexpr std::align_val_t ALIGN{64};
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, ALIGN); }
  };
  std::unique_ptr<T, Delete> memory_;
};

template <class T>
class Encoder {
 public:
  Encoder(const EncoderSizes& sizes, const EncoderWeights& w, double eps, double norm_eps)
      : s_(sizes),
        qkv_(dense(w.qkv, w.qkv_bias, s_.C, 3 * s_.width(), "qkv")),
        proj_(dense(w.proj, w.proj_bias, s_.width(), s_.C, "proj")),
        fc1_(dense(w.fc1, w.fc1_bias, s_.C, s_.hidden, "fc1")),
        fc2_(dense(w.fc2, w.fc2_bias, s_.hidden, s_.C, "fc2")),
        before_{static_cast<float>(eps), nullptr, nullptr},
        between_{static_cast<float>(norm_eps), data_or_null<float>(w.norm_weight),
                 data_or_null<float>(w.norm_bias)} {
    STD_TORCH_CHECK(w.norm_weight.has_value() == w.norm_bias.has_value(),
                    "norm_weight and norm_bias go together");
    check_small(w.norm_weight, ScalarType::Float, {s_.C}, "norm_weight");
    check_small(w.norm_bias, ScalarType::Float, {s_.C}, "norm_bias");
  }

  // x (images N, C) -> out, a few images at a time
  void run(const T* x, int64_t images, T* out) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::max<int64_t>(1, std::min(images, threads * ROWS_AT_ONCE / s_.N));
    PanelRows<float> projected(1, most * s_.N * 3 * s_.width()), heads(1, most * s_.N * s_.width());
    PanelRows<float> lse(1, most * s_.N * s_.H);
    for (int64_t b = 0; b < images; b += most) {
      const int64_t count = std::min(most, images - b), rows = count * s_.N, at = b * s_.N * s_.C;
      for_slabs(rows, [&](int64_t first, int64_t n) {
        project(x + at + first * s_.C, n, projected.data() + first * 3 * s_.width());
      });
      attend(count, projected.data(), heads.data(), lse.data());
      for_slabs(rows, [&](int64_t first, int64_t n) {
        finish(x + at + first * s_.C, heads.data() + first * s_.width(), n, out + at + first * s_.C);
      });
    }
  }

 private:
  static Dense<T> dense(const Tensor& weight, const Tensor& bias, int64_t in, int64_t out,
                        const char* name) {
    constexpr ScalarType dtype = sizeof(T) == 2 ? ScalarType::BFloat16 : ScalarType::Float;
    check_small(weight, dtype, {whole_panels(out) * whole_panels(in)}, name);
    check_small(bias, ScalarType::Float, {whole_panels(out)}, name);
    return {static_cast<const T*>(weight.const_data_ptr()), bias.const_data_ptr<float>(),
            whole_panels(in), out};
  }

  // f(first, count) for slabs of the rows, in parallel: equally many for every thread
  template <class F>
  static void for_slabs(int64_t rows, const F& f) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t slabs = threads * divide_up(divide_up(rows, threads), SLAB);
    const int64_t slab = divide_up(divide_up(rows, slabs), ROUND) * ROUND;
    torch::stable::parallel_for(0, divide_up(rows, slab), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i * slab, std::min(slab, rows - i * slab));
    });
  }

  void project(const T* x, int64_t count, float* out) const {
    const auto& kernels = dense_kernels<T>();
    PanelRows<float> wide(1, count * s_.C);
    PanelRows<T> rows(count, s_.C);
    kernels.widen(x, count * s_.C, wide.data());
    kernels.normalise(before_, wide.data(), count, s_.C, rows.data(), rows.stride);
    kernels.product(qkv_, rows.data(), count, false, out);
  }

  void attend(int64_t images, const float* projected, float* out, float* lse) const {
    const int64_t N = s_.N, H = s_.H, D = s_.D, width = s_.width();
    AttentionCall<float, float> call{images, H, N, N, D};
    call.q = {projected, N * 3 * width, D, 3 * width};
    call.k = {projected + width, N * 3 * width, D, 3 * width};
    call.v = {projected + 2 * width, N * 3 * width, D, 3 * width};
    call.key_mask = nullptr, call.bias = nullptr, call.head_scale = nullptr, call.seed = nullptr;
    call.scale = 1.0;  // it is in the weights
    const HeadsOf<float> to{out, N * width, D, width};
    attend_heads(call, to, lse);
  }

  void finish(const T* x, const float* heads, int64_t count, T* out) const {
    const auto& kernels = dense_kernels<T>();
    PanelRows<float> wide(1, count * s_.C);
    PanelRows<T> rows(count, s_.C), head_rows(count, s_.width()), hidden(count, s_.hidden);
    kernels.widen(x, count * s_.C, wide.data());
    kernels.narrow(heads, count, s_.width(), head_rows.data(), head_rows.stride);
    kernels.product(proj_, head_rows.data(), count, true, wide.data());
    kernels.normalise(between_, wide.data(), count, s_.C, rows.data(), rows.stride);
    kernels.gelu_product(fc1_, rows.data(), count, hidden.data());
    kernels.product(fc2_, hidden.data(), count, true, wide.data());
    kernels.narrow(wide.data(), count, s_.C, out, s_.C);
  }

  const EncoderSizes s_;
  const Dense<T> qkv_, proj_, fc1_, fc2_;
  const Norm before_, between_;
};

Tensor encoder(Tensor x, int64_t num_heads, int64_t head_dim, double eps, double norm_eps,
               Tensor qkv, Tensor qkv_bias, Tensor proj, Tensor proj_bias, Optional norm_weight,
               Optional norm_bias, Tensor fc1, Tensor fc1_bias, Tensor fc2, Tensor fc2_bias) {
  const bool is_float = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.is_contiguous() &&
                      (is_float || x.scalar_type() == ScalarType::BFloat16),
                  "x must be a contiguous float32 or bfloat16 CPU tensor (B, N, C)");
  STD_TORCH_CHECK(num_heads > 0 && head_dim > 0 && x.size(1) > 0 && x.size(2) > 0,
                  "there must be heads, tokens and channels");
  const EncoderSizes sizes{x.size(1), x.size(2), num_heads, head_dim, fc1_bias.numel()};
  const EncoderWeights weights{qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias,
                               norm_weight, norm_bias};
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  const auto run = [&]<class T>(T*) {
    Encoder<T>(sizes, weights, eps, norm_eps)
        .run(static_cast<const T*>(x.const_data_ptr()), x.size(0),
             static_cast<T*>(out.mutable_data_ptr()));
  };
  if (is_float) run(static_cast<float*>(nullptr));
  else run(static_cast<Bfloat16*>(nullptr));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C, m) {
  m.def("encoder(Tensor x, int num_heads, int head_dim, float eps, float norm_eps, Tensor qkv,"
        " Tensor qkv_bias, Tensor proj, Tensor proj_bias, Tensor? norm_weight, Tensor? norm_bias,"
        " Tensor fc1, Tensor fc1_bias, Tensor fc2, Tensor fc2_bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C, CPU, m) { m.impl("encoder", TORCH_BOX(&encoder)); }
