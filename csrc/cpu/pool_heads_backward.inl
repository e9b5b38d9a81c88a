// Gradient of pool_heads.inl, included after it: with p = exp(x.w - lse) and delta = do.pooled,
// ds = p (do.x - delta), dx = p do + ds w, and dw adds up ds x over the tokens of one image.

template <int D, class T, int... J>
void pool_block_backward(const T* x, int64_t stride_n, int64_t N, const float* w,
                         const PoolGradient<T>& grad, int64_t h,
                         std::integer_sequence<int, J...>) {
  const float* out_grad = grad.out_grad + h * D;
  const Vec lse = load(grad.lse + h), delta = scores<D>(out_grad, grad.pooled + h * D);
  Vec dw[D] = {};
  for (int64_t t = 0; t < N; ++t) {
    const T* token = x + t * stride_n;
    T* dx = grad.dx + t * grad.stride_n + h * D;
    const Vec p = exp_nonpositive(scores<D>(token, w) - lse);
    const Vec ds = p * (scores<D>(token, out_grad) - delta);
    (store(dx + J * LANES, spread<D, J>(p, Lanes()) * load(out_grad + J * LANES) +
                               spread<D, J>(ds, Lanes()) * load(w + J * LANES)),
     ...);
    ((dw[J] += spread<D, J>(ds, Lanes()) * load(token + J * LANES)), ...);
  }
  (store(grad.dw + h * D + J * LANES, dw[J]), ...);
}

// one head of any number of channels
template <class T>
void pool_head_backward(const T* x, int64_t stride_n, int64_t N, int64_t D, const float* w,
                        const PoolGradient<T>& grad, int64_t h) {
  const float* out_grad = grad.out_grad + h * D;
  const float delta = dot(grad.pooled + h * D, out_grad, D);
  float* dw = grad.dw + h * D;
  std::fill(dw, dw + D, 0.0f);
  for (int64_t first = 0; first < N; first += CHUNK) {
    const int64_t count = std::min(CHUNK, N - first);
    const T* token = x + first * stride_n;
    float p[CHUNK] = {}, ds[CHUNK];
    for (int64_t t = 0; t < count; ++t) p[t] = dot(token + t * stride_n, w, D) - grad.lse[h];
    for (int64_t t = 0; t < CHUNK; t += LANES) store(p + t, exp_nonpositive(load(p + t)));
    for (int64_t t = 0; t < count; ++t) {
      ds[t] = p[t] * (dot(token + t * stride_n, out_grad, D) - delta);
      T* dx = grad.dx + (first + t) * grad.stride_n + h * D;
      int64_t d = 0;
      for (; d + LANES <= D; d += LANES) {
        store(dx + d, load(out_grad + d) * p[t] + load(w + d) * ds[t]);
      }
      for (; d < D; ++d) dx[d] = from_float<T>(out_grad[d] * p[t] + w[d] * ds[t]);
    }
    accumulate(token, stride_n, count, ds, 1.0f, D, dw);
  }
}

template <int D, class T>
void pool_blocks_backward(const T* x, int64_t stride_n, int64_t N, int64_t H, const float* w,
                          const PoolGradient<T>& grad) {
  for (int64_t first = 0; first < H; first += LANES) {
    const int64_t h = std::min(first, H - LANES);
    pool_block_backward<D>(x + h * D, stride_n, N, w + h * D, grad, h,
                           std::make_integer_sequence<int, D>());
  }
}

template <class T>
void pool_heads_backward(const T* x, int64_t stride_n, int64_t N, int64_t H, int64_t D,
                         const float* w, const PoolGradient<T>& grad) {
  if (H >= LANES) {
    switch (D) {
      case 1: return pool_blocks_backward<1>(x, stride_n, N, H, w, grad);
      case 2: return pool_blocks_backward<2>(x, stride_n, N, H, w, grad);
      case 4: return pool_blocks_backward<4>(x, stride_n, N, H, w, grad);
      case 8: return pool_blocks_backward<8>(x, stride_n, N, H, w, grad);
      case 16: return pool_blocks_backward<16>(x, stride_n, N, H, w, grad);
    }
  }
  for (int64_t h = 0; h < H; ++h) {
    pool_head_backward(x + h * D, stride_n, N, D, w + h * D, grad, h);
  }
}
