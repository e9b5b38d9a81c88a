// Gradients of one image for one block of channels; included after conv_stem.inl.
//
// A token passes its gradient to one sum, so dw[c] adds one patch of the image per token instead
// of one per sum. Vectors run along the patch.

// patches of one row of sums, each followed by a one for the bias; what follows that is not read
inline void copy_patches(const StemSizes& s, const float* image, int64_t y, float* row) {
  const int64_t run = s.conv.kernel * s.CIN, depth = s.padded_depth();
  row += s.pool.padding * depth;
  const int64_t columns = std::min(s.WC, patch_columns(s) - s.pool.padding);
  for (int64_t x = 0; x < columns; ++x, row += depth) {
    const float* corner = image + y * s.conv.stride * s.pitch() + x * s.conv.stride * s.CIN;
    for (int64_t ky = 0; ky < s.conv.kernel; ++ky) {
      // in whole vectors: what is too much is overwritten by the next copy
      for (int64_t i = 0; i < run; i += 16) {
        std::memcpy(row + ky * run + i, corner + ky * s.pitch() + i, 16 * sizeof(float));
      }
    }
    row[s.depth()] = 1.0f;
  }
}

// the gradients of a row of tokens, with zero where the output was zero
template <class T>
inline void mask_row(const StemSizes& s, const T* out_grad, const uint8_t* codes, int64_t count,
                     float* masked) {
  const int zero = static_cast<int>(s.pool.kernel * s.pool.kernel);
  for (int64_t x = 0; x < s.WO; ++x, out_grad += s.C, codes += s.C, masked += BLOCK) {
    if (count >= BLOCK) {
      for (int i = 0; i < WIDTH; ++i) {
        const Vec g = load(out_grad + i * LANES);
        store(masked + i * LANES, load_codes(codes + i * LANES) == zero ? fill(0.0f) : g);
      }
    } else {
      for (int64_t c = 0; c < count; ++c) masked[c] = codes[c] == zero ? 0 : to_float(out_grad[c]);
    }
  }
}

// dw of CHANNELS neighbouring channels, one row of tokens, DEPTH vectors a patch
template <int DEPTH, int CHANNELS>
inline void add_patches(const StemSizes& s, const float* masked, const uint8_t* codes,
                        const float* patches, const int32_t* places, float* dw) {
  Vec acc[CHANNELS][DEPTH];
  for (int c = 0; c < CHANNELS; ++c) {
    for (int i = 0; i < DEPTH; ++i) acc[c][i] = load(dw + (c * DEPTH + i) * LANES);
  }
  const int64_t step = s.pool.stride * DEPTH * LANES;
  for (int64_t x = 0; x < s.WO; ++x, codes += s.C, masked += BLOCK, patches += step) {
    for (int c = 0; c < CHANNELS; ++c) {
      const float* patch = patches + places[codes[c]];
      const Vec g = fill(masked[c]);
      for (int i = 0; i < DEPTH; ++i) acc[c][i] += g * load(patch + i * LANES);
    }
  }
  for (int c = 0; c < CHANNELS; ++c) {
    for (int i = 0; i < DEPTH; ++i) store(dw + (c * DEPTH + i) * LANES, acc[c][i]);
  }
}

template <int DEPTH, class T>
void weight_gradient(const StemSizes& s, const float* image, const T* out_grad,
                     const uint8_t* codes, int64_t first, float* patches, float* dw) {
  constexpr int CHANNELS = DEPTH < 8 ? 8 / DEPTH : 1;
  const int64_t kernel = s.pool.kernel, count = std::min(BLOCK, s.C - first);
  const int64_t depth = DEPTH * LANES, pitch = patch_pitch(s);
  std::vector<float> masked(s.WO * BLOCK);
  // where a code's patch lies, from the window's first column; that of zero is read and not used
  std::vector<int32_t> places(kernel * kernel + 1, 0);
  int64_t ready = 0;
  for (int64_t y = 0; y < s.HO; ++y) {
    const int64_t top = y * s.pool.stride - s.pool.padding;
    ready = std::max(ready, top);
    for (; ready < std::min(top + kernel, s.HC); ++ready) {
      copy_patches(s, image, ready, patches + ready % kernel * pitch);
    }
    for (int64_t ky = 0; ky < kernel; ++ky) {
      const int64_t row = (top + ky + kernel) % kernel * pitch;
      for (int64_t kx = 0; kx < kernel; ++kx) places[ky * kernel + kx] = row + kx * depth;
    }
    const int64_t token = y * s.WO * s.C + first;
    mask_row(s, out_grad + token, codes + token, count, masked.data());
    int64_t c = 0;
    for (; c + CHANNELS <= count; c += CHANNELS) {
      add_patches<DEPTH, CHANNELS>(s, masked.data() + c, codes + token + c, patches,
                                   places.data(), dw + (first + c) * depth);
    }
    for (; c < count; ++c) {
      add_patches<DEPTH, 1>(s, masked.data() + c, codes + token + c, patches, places.data(),
                            dw + (first + c) * depth);
    }
  }
}

template <class T>
void stem_backward(const StemSizes& s, const float* image, const T* out_grad, const uint8_t* codes,
                   int64_t first, float* patches, float* dw) {
  constexpr int D = 16 / LANES;
  switch (s.padded_depth()) {
    case 16: return weight_gradient<D>(s, image, out_grad, codes, first, patches, dw);
    case 32: return weight_gradient<2 * D>(s, image, out_grad, codes, first, patches, dw);
    case 48: return weight_gradient<3 * D>(s, image, out_grad, codes, first, patches, dw);
  }
}

template <class T>
void stem_scatter(const StemSizes& s, const T* out_grad, const uint8_t* codes, int64_t first,
                  float* dy) {
  const int64_t kernel = s.pool.kernel, count = std::min(BLOCK, s.C - first);
  for (int64_t n = 0; n < s.HO * s.WO; ++n) {
    const int64_t top = n / s.WO * s.pool.stride - s.pool.padding;
    const int64_t left = n % s.WO * s.pool.stride - s.pool.padding;
    const int64_t token = n * s.C + first;
    for (int64_t code = 0; code < kernel * kernel; ++code) {
      const int64_t y = top + code / kernel, x = left + code % kernel;
      if (y < 0 || y >= s.HC || x < 0 || x >= s.WC) continue;
      float* to = dy + (y * s.WC + x) * s.C + first;
      int64_t c = 0;
      for (; c + LANES <= count; c += LANES) {
        const Vec g = load(out_grad + token + c);
        const IntVec chosen = load_codes(codes + token + c) == static_cast<int>(code);
        store(to + c, load(to + c) + (chosen ? g : fill(0.0f)));
      }
      for (; c < count; ++c) {
        if (codes[token + c] == code) to[c] += to_float(out_grad[token + c]);
      }
    }
  }
}
