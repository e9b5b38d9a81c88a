// Products of rows with packed weights, and what stands around them in a transformer block, by the
// widest vectors that this processor has.

#pragma once

#include <cstdint>

#include "bfloat16.h"

// Weights lie in panels of so many output columns: (panels, in / PAIR, PANEL, PAIR), so that the
// inner numbers of a product are read in the order of memory. Both sizes are padded with zeros to
// multiples of PANEL.
constexpr int64_t PANEL = 32;

// bfloat16 is multiplied two numbers at a time
template <class T>
constexpr int64_t PAIR = sizeof(T) == 2 ? 2 : 1;

inline int64_t whole_panels(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// x W^T + b; T: of the rows and weights. Sums are fp32, each in the order of the inner numbers.
template <class T>
struct Dense {
  const T* weight;
  const float* bias;  // padded like the columns
  int64_t in, out;    // whole panels, columns in use
};

// LayerNorm, with an affine part where there are weights
struct Norm {
  float eps;
  const float *weight, *bias;  // both or neither
};

template <class T>
struct DenseKernels {
  // rows of `in` numbers -> out (rows, dense.out), added to it where `add`
  void (*product)(const Dense<T>& dense, const T* rows, int64_t count, bool add, float* out);
  // the same through GELU, in the type and row length of the next product's rows
  void (*gelu_product)(const Dense<T>& dense, const T* rows, int64_t count, T* out);
  // rows of C numbers, normalised, to rows `stride` apart; with an affine part also in place
  void (*normalise)(const Norm& norm, float* x, int64_t count, int64_t C, T* out, int64_t stride);
  void (*narrow)(const float* x, int64_t count, int64_t C, T* out, int64_t stride);
  void (*widen)(const T* x, int64_t size, float* out);
};

template <class T>
const DenseKernels<T>& dense_kernels();
