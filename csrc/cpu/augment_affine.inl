// Resampling. Included once per instruction set.

// a pixel's channels side by side; the last lanes are idle
typedef double Pixel __attribute__((vector_size(32)));
typedef int32_t PixelInts __attribute__((vector_size(16)));

inline Pixel spread(double x) { return Pixel{x, x, x, x}; }

// the weights of a crop of `length` pixels
inline const int32_t* resize_rows(const int32_t* table, int64_t size, int64_t kind, int64_t length) {
  return table + (kind * (size + 1) + length) * size * AUGMENT_ROW;
}

// Pillow's weights have 22 bits after the point
constexpr int RESIZE_BITS = 22;

inline uint8_t resize_byte(int32_t sum) {
  return static_cast<uint8_t>(between(sum >> RESIZE_BITS, 0, 255));
}

// Lines of `stride` bytes, of which the first `n` count: out line i is a weighted sum of in lines.
// Taps that fall beyond the last line have weight 0 and read it once more.
inline void resize_lines(const uint8_t* in, int64_t lines, int64_t n, int64_t stride,
                         const int32_t* row, int64_t size, uint8_t* out) {
  for (int64_t i = 0; i < size; ++i, row += AUGMENT_ROW) {
    const uint8_t* tap[4];
    for (int64_t t = 0; t < 4; ++t) {
      tap[t] = in + lower<int64_t>(row[0] + t, lines - 1) * stride;
    }
    const int32_t w0 = row[1], w1 = row[2], w2 = row[3], w3 = row[4];
    uint8_t* line = out + i * stride;
    for (int64_t j = 0; j < n; ++j) {
      line[j] = resize_byte((1 << (RESIZE_BITS - 1)) + tap[0][j] * w0 + tap[1][j] * w1 +
                            tap[2][j] * w2 + tap[3][j] * w3);
    }
  }
}

// The box of `crop` stretched to the whole image, mirrored where it says so. Rows are resized as
// columns of a transposed image, where neighbours in memory have equal weights.
void resized_crop(const uint8_t* in, const int32_t* crop, const ResizeTables& tables,
                  const AugmentSizes& s, AugmentScratch& scratch, uint8_t* out) {
  const int64_t top = crop[0], left = crop[1], height = crop[2], width = crop[3], kind = crop[4];
  const int64_t lines = s.C * height;
  uint8_t *columns = scratch.columns.data(), *rows = scratch.rows.data();
  for (int64_t c = 0; c < s.C; ++c) {
    for (int64_t y = 0; y < height; ++y) {
      const uint8_t* line = in + (c * s.H + top + y) * s.W + left;
      uint8_t* to = columns + c * height + y;
      for (int64_t x = 0; x < width; ++x) to[x * lines] = line[x];
    }
  }
  resize_lines(columns, width, lines, lines, resize_rows(tables.horizontal, s.W, kind, width), s.W,
               rows);
  for (int64_t x = 0; x < s.W; ++x) {
    const uint8_t* line = rows + x * lines;
    uint8_t* to = columns + (crop[5] ? s.W - 1 - x : x);
    for (int64_t j = 0; j < lines; ++j) to[j * s.W] = line[j];
  }
  const int32_t* row = resize_rows(tables.vertical, s.H, kind, height);
  for (int64_t c = 0; c < s.C; ++c) {
    resize_lines(columns + c * height * s.W, height, s.W, s.W, row, s.H, out + c * s.H * s.W);
  }
}

inline Pixel cubic(Pixel a, Pixel b, Pixel c, Pixel d, Pixel t) {
  const Pixel p2 = c - a, p3 = 2 * (a - b) + c - d, p4 = b - a - c + d;
  return b + t * (p2 + t * (p3 + t * p4));
}

inline Pixel linear(Pixel a, Pixel b, Pixel t) { return a + (b - a) * t; }

// Pixels with two more of the edge's on every side, so that no tap needs a test.
void pad_pixels(const uint8_t* in, const AugmentSizes& s, Pixel* out) {
  for (int64_t y = -2; y < s.H + 2; ++y) {
    const uint8_t* line = in + between<int64_t>(y, 0, s.H - 1) * s.W;
    for (int64_t x = -2; x < s.W + 2; ++x) {
      const uint8_t* pixel = line + between<int64_t>(x, 0, s.W - 1);
      Pixel value = spread(pixel[0]);
      for (int64_t c = 1; c < s.C; ++c) value[c] = pixel[c * s.pixels()];
      *out++ = value;
    }
  }
}

inline Pixel sample(const Pixel* corner, int64_t stride, bool bicubic, double du, double dv) {
  const Pixel u = spread(du), v = spread(dv);
  if (!bicubic) {
    const Pixel *p = corner + stride + 1, *q = p + stride;
    return linear(linear(p[0], p[1], u), linear(q[0], q[1], u), v);
  }
  Pixel rows[4];
  for (int r = 0; r < 4; ++r) {
    const Pixel* p = corner + r * stride;
    rows[r] = cubic(p[0], p[1], p[2], p[3], u);
  }
  return cubic(rows[0], rows[1], rows[2], rows[3], v);
}

// numbers: filter, a..f
void affine(const uint8_t* in, const double* numbers, const int64_t* fill, const AugmentSizes& s,
            AugmentScratch& scratch, uint8_t* out) {
  // vectors of 32 bytes must lie on such a border
  void* start = scratch.padded.data();
  size_t space = scratch.padded.size() * sizeof(double);
  Pixel* padded = static_cast<Pixel*>(std::align(32, sizeof(Pixel), start, space));
  pad_pixels(in, s, padded);
  const int64_t stride = s.W + 4;
  const bool bicubic = numbers[0] != 0;
  const double a = numbers[1], b = numbers[2], c = numbers[3];
  const double d = numbers[4], e = numbers[5], f = numbers[6];
  const PixelInts border = {static_cast<int>(fill[0]), s.C > 1 ? static_cast<int>(fill[1]) : 0,
                            s.C > 1 ? static_cast<int>(fill[2]) : 0, 0};
  for (int64_t y = 0; y < s.H; ++y) {
    for (int64_t x = 0; x < s.W; ++x) {
      const double u = a * (x + 0.5) + b * (y + 0.5) + c, v = d * (x + 0.5) + e * (y + 0.5) + f;
      PixelInts value = border;
      if (u >= 0 && u < s.W && v >= 0 && v < s.H) {
        const double left = u - 0.5, top = v - 0.5;
        // rounded down; neither is below -0.5
        const int64_t i = left < 0 ? -1 : static_cast<int64_t>(left);
        const int64_t j = top < 0 ? -1 : static_cast<int64_t>(top);
        Pixel p = sample(padded + (j + 1) * stride + i + 1, stride, bicubic, left - i, top - j);
        p = p < spread(0) ? spread(0) : p;
        p = p > spread(255) ? spread(255) : p;
        value = __builtin_convertvector(p, PixelInts);
      }
      for (int64_t k = 0; k < s.C; ++k) {
        out[k * s.pixels() + y * s.W + x] = static_cast<uint8_t>(value[k]);
      }
    }
  }
}
