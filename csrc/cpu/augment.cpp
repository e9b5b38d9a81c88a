// lsmha_fast_C::augment and mix_and_erase: images of a data set, augmented one by one, mixed and
// normalised.

#include "augment.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// bytes of images below which another thread does not pay
constexpr int64_t GRAIN = 1 << 14;
constexpr int64_t BOX = 5, LEVELS = 1 << 16;

void check(const Tensor& t, ScalarType dtype, int64_t numel, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() &&
                      t.numel() == numel,
                  what);
}

AugmentSizes sizes_of(const Tensor& images) {
  STD_TORCH_CHECK(images.is_cpu() && images.dim() == 4 && images.is_contiguous() &&
                      images.scalar_type() == ScalarType::Byte &&
                      (images.size(1) == 1 || images.size(1) == 3),
                  "images must be contiguous uint8 (B, 1 or 3, H, W) on the CPU");
  return {images.size(1), images.size(2), images.size(3)};
}

void check_rows(const int64_t* index, const int32_t* crops, int64_t B, int64_t M,
                const AugmentSizes& s) {
  for (int64_t b = 0; b < B; ++b, crops += AUGMENT_CROP) {
    STD_TORCH_CHECK(index[b] >= 0 && index[b] < M, "index ", index[b], " is not in 0..", M - 1);
    STD_TORCH_CHECK(crops[0] >= 0 && crops[2] >= 1 && crops[0] + crops[2] <= s.H && crops[1] >= 0 &&
                        crops[3] >= 1 && crops[1] + crops[3] <= s.W,
                    "the box (", crops[0], ", ", crops[1], ", ", crops[2], ", ", crops[3],
                    ") is not inside ", s.H, "x", s.W);
    STD_TORCH_CHECK(crops[4] == 0 || crops[4] == 1, "filter ", crops[4], " is not 0 or 1");
  }
}

Tensor augment(Tensor images, Tensor index, Tensor crops, Tensor layers, Tensor horizontal,
               Tensor vertical, std::vector<int64_t> fill) {
  const AugmentSizes s = sizes_of(images);
  const int64_t B = index.numel(), M = images.size(0), L = layers.size(1);
  check(index, ScalarType::Long, B, "index must be contiguous int64 (B,)");
  check(crops, ScalarType::Int, B * AUGMENT_CROP, "crops must be contiguous int32 (B, 6)");
  check(layers, ScalarType::Double, B * L * AUGMENT_LAYER,
        "layers must be contiguous float64 (B, L, 8)");
  check(horizontal, ScalarType::Int, 2 * (s.W + 1) * s.W * AUGMENT_ROW, "a table for the width");
  check(vertical, ScalarType::Int, 2 * (s.H + 1) * s.H * AUGMENT_ROW, "a table for the height");
  STD_TORCH_CHECK(static_cast<int64_t>(fill.size()) == s.C, "fill must have one byte per channel");
  const int64_t* rows = index.const_data_ptr<int64_t>();
  const int32_t* boxes = crops.const_data_ptr<int32_t>();
  check_rows(rows, boxes, B, M, s);

  Tensor out = torch::stable::new_empty(images, {B, s.C, s.H, s.W});
  const uint8_t* in = images.const_data_ptr<uint8_t>();
  const double* steps = layers.const_data_ptr<double>();
  const ResizeTables tables{horizontal.const_data_ptr<int32_t>(),
                            vertical.const_data_ptr<int32_t>()};
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const AugmentKernels& kernels = augment_kernels();
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, s.numel()));
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    AugmentScratch scratch(s);
    for (int64_t b = begin; b < end; ++b) {
      kernels.image(in + rows[b] * s.numel(), boxes + b * AUGMENT_CROP,
                    steps + b * L * AUGMENT_LAYER, L, tables, fill.data(), s, scratch,
                    to + b * s.numel());
    }
  });
  return out;
}

// 16 random bits of pixel i, from SplitMix64
inline uint64_t level_of(uint64_t word, uint64_t i) {
  uint64_t x = word + (i + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return (x ^ (x >> 31)) >> 48;
}

void erase(const int64_t* box, const float* noise, const AugmentSizes& s, float* out) {
  for (int64_t c = 0; c < s.C; ++c) {
    for (int64_t y = box[0]; y < box[0] + box[2]; ++y) {
      for (int64_t x = box[1]; x < box[1] + box[3]; ++x) {
        const int64_t i = (c * s.H + y) * s.W + x;
        out[i] = noise[level_of(static_cast<uint64_t>(box[4]), i)];
      }
    }
  }
}

// the bytes of one image, mixed with its partner's
void mix(const uint8_t* own, const uint8_t* partner, double weight,
         const std::vector<int64_t>& cut, const AugmentSizes& s, uint8_t* out) {
  if (!cut.empty()) {
    std::copy(own, own + s.numel(), out);
    for (int64_t c = 0; c < s.C; ++c) {
      for (int64_t y = cut[0]; y < cut[1]; ++y) {
        const int64_t row = (c * s.H + y) * s.W;
        std::copy(partner + row + cut[2], partner + row + cut[3], out + row + cut[2]);
      }
    }
    return;
  }
  augment_kernels().mixup(own, partner, s.numel(), static_cast<float>(weight),
                          static_cast<float>(1 - weight), out);
}

Tensor mix_and_erase(Tensor images, Tensor boxes, Tensor table, Tensor noise, double weight,
                     std::vector<int64_t> cut) {
  const AugmentSizes s = sizes_of(images);
  const int64_t B = images.size(0);
  check(boxes, ScalarType::Long, B * BOX, "boxes must be contiguous int64 (B, 5)");
  check(table, ScalarType::Float, s.C * 256, "table must be contiguous float32 (C, 256)");
  check(noise, ScalarType::Float, LEVELS, "noise must be contiguous float32 (65536,)");
  const int64_t* box = boxes.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* row = box + b * BOX;
    STD_TORCH_CHECK(row[0] >= 0 && row[2] >= 0 && row[0] + row[2] <= s.H && row[1] >= 0 &&
                        row[3] >= 0 && row[1] + row[3] <= s.W,
                    "the box (", row[0], ", ", row[1], ", ", row[2], ", ", row[3],
                    ") is not inside ", s.H, "x", s.W);
  }
  Tensor out = torch::stable::new_empty(table, {B, s.C, s.H, s.W});
  const uint8_t* in = images.const_data_ptr<uint8_t>();
  const float *values = table.const_data_ptr<float>(), *levels = noise.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const bool mixed = !cut.empty() || weight != 1;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, s.numel()));
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> bytes(s.numel());
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* own = in + b * s.numel();
      if (mixed) {
        mix(own, in + (B - 1 - b) * s.numel(), weight, cut, s, bytes.data());
        own = bytes.data();
      }
      float* image = to + b * s.numel();
      for (int64_t c = 0; c < s.C; ++c) {
        for (int64_t i = c * s.pixels(); i < (c + 1) * s.pixels(); ++i) {
          image[i] = values[c * 256 + own[i]];
        }
      }
      erase(box + b * BOX, levels, s, image);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lsmha_fast_C, m) {
  m.def("augment(Tensor images, Tensor index, Tensor crops, Tensor layers, Tensor horizontal,"
        " Tensor vertical, int[] fill) -> Tensor");
  m.def("mix_and_erase(Tensor images, Tensor boxes, Tensor table, Tensor noise, float weight,"
        " int[] cut) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lsmha_fast_C, CPU, m) {
  m.impl("augment", TORCH_BOX(&augment));
  m.impl("mix_and_erase", TORCH_BOX(&mix_and_erase));
}
