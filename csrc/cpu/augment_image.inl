// One image through its layers. Included once per instruction set, after the operations.

void apply_layer(const uint8_t* in, const double* layer, const int64_t* fill,
                 const AugmentSizes& s, AugmentScratch& scratch, uint8_t* out) {
  const int64_t n = s.pixels(), all = s.numel();
  const double number = layer[1];
  const int level = static_cast<int>(number);
  const float factor = static_cast<float>(number);
  switch (static_cast<AugmentCode>(static_cast<int>(layer[0]))) {
    case AugmentCode::AUTO_CONTRAST:
      for (int64_t c = 0; c < s.C; ++c) auto_contrast(in + c * n, n, out + c * n);
      return;
    case AugmentCode::EQUALIZE:
      for (int64_t c = 0; c < s.C; ++c) equalize(in + c * n, n, out + c * n);
      return;
    case AugmentCode::INVERT:
      for (int64_t i = 0; i < all; ++i) out[i] = 255 - in[i];
      return;
    case AugmentCode::AFFINE:
      return affine(in, layer + 1, fill, s, scratch, out);
    case AugmentCode::POSTERIZE: {
      const uint8_t mask = static_cast<uint8_t>(~((1 << (8 - level)) - 1));
      for (int64_t i = 0; i < all; ++i) out[i] = in[i] & mask;
      return;
    }
    case AugmentCode::SOLARIZE:
      for (int64_t i = 0; i < all; ++i) out[i] = in[i] < level ? in[i] : 255 - in[i];
      return;
    case AugmentCode::SOLARIZE_ADD:
      for (int64_t i = 0; i < all; ++i) out[i] = in[i] < 128 ? lower(in[i] + level, 255) : in[i];
      return;
    case AugmentCode::COLOR:
      return color(in, factor, s, out);
    case AugmentCode::CONTRAST: {
      const float mean = mean_luma(in, s);
      return apply_table(in, all, out, [=](int i) { return blend(mean, factor, i); });
    }
    case AugmentCode::BRIGHTNESS:
      return apply_table(in, all, out, [=](int i) { return blend(0, factor, i); });
    case AugmentCode::SHARPNESS:
      for (int64_t c = 0; c < s.C; ++c) sharpness(in + c * n, factor, s.H, s.W, out + c * n);
      return;
    default:
      std::memcpy(out, in, all);
  }
}

void augment_image(const uint8_t* in, const int32_t* crop, const double* layers, int64_t count,
                   const ResizeTables& tables, const int64_t* fill, const AugmentSizes& s,
                   AugmentScratch& scratch, uint8_t* out) {
  uint8_t* here = scratch.other.data();
  std::vector<const double*> todo;
  for (int64_t l = 0; l < count; ++l) {
    if (layers[l * AUGMENT_LAYER] != 0) todo.push_back(layers + l * AUGMENT_LAYER);
  }
  // the last of the steps writes into out
  uint8_t *to = todo.size() % 2 ? here : out, *from = todo.size() % 2 ? out : here;
  resized_crop(in, crop, tables, s, scratch, to);
  for (const double* layer : todo) {
    std::swap(from, to);
    apply_layer(from, layer, fill, s, scratch, to);
  }
}
