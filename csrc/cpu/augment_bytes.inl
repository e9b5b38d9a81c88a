// Operations on single bytes, by table, blend or small filter. Included once per instruction set.

inline uint8_t blend(float base, float factor, float x) {
  const float value = base + factor * (x - base);
  return static_cast<uint8_t>(lower(upper(value, 0.0f), 255.0f));
}

inline int32_t luma(int32_t r, int32_t g, int32_t b) {
  return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
}

// out[i] = table[in[i]]
inline void look_up(const uint8_t* in, const uint8_t* table, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = table[in[i]];
}

template <class F>
void apply_table(const uint8_t* in, int64_t n, uint8_t* out, const F& f) {
  uint8_t table[256];
  for (int i = 0; i < 256; ++i) table[i] = f(i);
  look_up(in, table, n, out);
}

void auto_contrast(const uint8_t* in, int64_t n, uint8_t* out) {
  uint8_t low = 255, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = lower(low, in[i]);
    high = upper(high, in[i]);
  }
  if (high <= low) {
    std::memcpy(out, in, n);
    return;
  }
  const double scale = 255.0 / (high - low), offset = -low * scale;
  apply_table(in, n, out, [=](int i) {
    return static_cast<uint8_t>(between(static_cast<int>(i * scale + offset), 0, 255));
  });
}

void equalize(const uint8_t* in, int64_t n, uint8_t* out) {
  int64_t counts[256] = {};
  for (int64_t i = 0; i < n; ++i) ++counts[in[i]];
  int64_t brightest = 255;
  while (counts[brightest] == 0) --brightest;
  const int64_t step = (n - counts[brightest]) / 255;
  if (step == 0) {
    std::memcpy(out, in, n);
    return;
  }
  int64_t sum = step / 2;
  apply_table(in, n, out, [&](int i) {
    const int64_t value = lower<int64_t>(sum / step, 255);
    sum += counts[i];
    return static_cast<uint8_t>(value);
  });
}

void color(const uint8_t* in, float factor, const AugmentSizes& s, uint8_t* out) {
  const int64_t n = s.pixels();
  if (s.C == 1) {
    std::memcpy(out, in, n);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t r = in[i], g = in[i + n], b = in[i + 2 * n];
    const float grey = static_cast<float>(luma(r, g, b));
    out[i] = blend(grey, factor, static_cast<float>(r));
    out[i + n] = blend(grey, factor, static_cast<float>(g));
    out[i + 2 * n] = blend(grey, factor, static_cast<float>(b));
  }
}

float mean_luma(const uint8_t* in, const AugmentSizes& s) {
  const int64_t n = s.pixels();
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += s.C == 1 ? in[i] : luma(in[i], in[i + n], in[i + 2 * n]);
  }
  return static_cast<float>(static_cast<int>(static_cast<double>(sum) / n + 0.5));
}

// one channel; the smoothed image keeps the border
void sharpness(const uint8_t* in, float factor, int64_t H, int64_t W, uint8_t* out) {
  std::memcpy(out, in, H * W);
  for (int64_t y = 1; y < H - 1; ++y) {
    const uint8_t *up = in + (y - 1) * W, *row = up + W, *down = row + W;
    for (int64_t x = 1; x < W - 1; ++x) {
      const int32_t sum = up[x - 1] + up[x] + up[x + 1] + row[x - 1] + 5 * row[x] + row[x + 1] +
                          down[x - 1] + down[x] + down[x + 1];
      // sum / 13, rounded; Pillow's floats never come near the halves
      const float smooth = static_cast<float>((2 * sum + 13) / 26);
      out[y * W + x] = blend(smooth, factor, static_cast<float>(row[x]));
    }
  }
}

inline void mixup(const uint8_t* own, const uint8_t* partner, int64_t n, float weight, float rest,
           uint8_t* out) {
  // to the nearest whole number, ties to even: 2^23 leaves no bits behind the point
  constexpr float SHIFT = 8388608.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float mixed = own[i] * weight + partner[i] * rest;
    out[i] = static_cast<uint8_t>(static_cast<int32_t>((mixed + SHIFT) - SHIFT));
  }
}
