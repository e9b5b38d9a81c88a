// Residual, stochastic depth and LayerNorm of rows and their gradient, by the widest vectors that this
// processor has.

#pragma once

#include <cstdint>

#include "bfloat16.h"

// dense rows of C numbers; absent where data is null
struct Rows {
  char* data = nullptr;
  bool bfloat16 = false;

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* row(int64_t i, int64_t C) const { return reinterpret_cast<T*>(data) + i * C; }
};

struct NormRows {
  int64_t C, rows_per_sample;
  bool post_norm;
  Rows x, branch;
  const float* keep;  // one factor per sample, or null
  // C numbers, then zeros up to a multiple of the kernels' block
  const float *weight, *bias;
  float *mean, *rstd;  // one per row
};

struct NormResult {
  Rows stream, y;
  float eps;
};

struct NormGradient {
  Rows dy, dstream, dx, dbranch;
  // sums over the rows, as long as the weight, or null
  float *dweight, *dbias;
};

struct NormKernels {
  // rows are padded to a multiple of this many numbers
  int64_t block;
  // rows first..last-1; scratch holds one row forward, two backward
  void (*forward)(const NormRows&, const NormResult&, int64_t first, int64_t last, float* scratch);
  void (*backward)(const NormRows&, const NormGradient&, int64_t first, int64_t last,
                   float* scratch);
};

const NormKernels& norm_kernels();
