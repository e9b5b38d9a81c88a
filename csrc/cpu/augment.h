// Augmentation of one image, byte for byte as in Pillow.

#pragma once

#include <cstdint>
#include <vector>

// what a layer does: the codes of ops/augment/common.py
enum class AugmentCode : int {
  NONE,
  AUTO_CONTRAST,
  EQUALIZE,
  INVERT,
  AFFINE,
  POSTERIZE,
  SOLARIZE,
  SOLARIZE_ADD,
  COLOR,
  CONTRAST,
  BRIGHTNESS,
  SHARPNESS
};

struct AugmentSizes {
  int64_t C, H, W;
  int64_t pixels() const { return H * W; }
  int64_t numel() const { return C * H * W; }
};

// columns of crops and layers, and of a row of the resize tables
constexpr int64_t AUGMENT_CROP = 6, AUGMENT_LAYER = 8, AUGMENT_ROW = 5;

// (2, size + 1, size, 5) each
struct ResizeTables {
  const int32_t *horizontal, *vertical;
};

// memory of one thread
struct AugmentScratch {
  explicit AugmentScratch(const AugmentSizes& s)
      : columns(s.numel()), rows(s.numel()), other(s.numel()),
        padded((s.H + 4) * (s.W + 4) * 4 + 4) {}
  std::vector<uint8_t> columns, rows, other;
  std::vector<double> padded;
};

struct AugmentKernels {
  // in and out: (C, H, W)
  void (*image)(const uint8_t* in, const int32_t* crop, const double* layers, int64_t count,
                const ResizeTables& tables, const int64_t* fill, const AugmentSizes& sizes,
                AugmentScratch& scratch, uint8_t* out);
  // out = round(weight * own + rest * partner), n bytes
  void (*mixup)(const uint8_t* own, const uint8_t* partner, int64_t n, float weight, float rest,
                uint8_t* out);
};

const AugmentKernels& augment_kernels();
