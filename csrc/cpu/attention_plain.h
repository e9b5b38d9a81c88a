// Attention of one head in double precision, one query at a time: for gradient checks, not for speed.

#pragma once

#include "attention_call.h"

class PlainHead {
 public:
  using Call = AttentionCall<double, double>;
  using Backward = AttentionBackwardCall<double, double>;

  PlainHead(const Call& call, int64_t b, int64_t h) : call_(call), b_(b), h_(h) {
    list_keys(call, b, keys_);
    p_.resize(keys_.size());
    if (call.seed == nullptr) return;
    keep_.resize(keys_.size() * padded(call.L) / PAD);
    attention_kernels().keep_bits(dropout_of(call, b, h), keys_.data(), count(), padded(call.L),
                                  keep_.data());
  }

  void forward(const HeadsOf<double>& out, double* lse) {
    for (int64_t i = 0; i < call_.L; ++i) {
      logits(i);
      const double top = p_.empty() ? -INFINITY : *std::max_element(p_.begin(), p_.end());
      double total = 0;
      for (double s : p_) total += std::exp(s - top);
      lse[i] = top == -INFINITY ? -INFINITY : top + std::log(total);
      double* o = out.head(b_, h_) + i * out.stride_n;
      std::fill(o, o + call_.D, 0.0);
      for (int64_t row = 0; row < count(); ++row) {
        const double p = weight(row, lse[i]) * factor(i, row) * head_scale();
        const double* v = at(call_.v, keys_[row]);
        for (int64_t d = 0; d < call_.D; ++d) o[d] += p * v[d];
      }
    }
  }

  void backward(const Backward& g, const BiasGradient<double>& dbias) {
    for (const auto* t : {&g.dk, &g.dv}) clear(*t, call_.S);
    clear(g.dq, call_.L);
    double dhead_scale = 0;
    for (int64_t i = 0; i < call_.L; ++i) {
      logits(i);
      const double lse = g.lse[(b_ * call_.H + h_) * call_.L + i];
      const double *dout = at(g.dout, i), *q = at(call_.q, i);
      const double delta = dot(dout, at(g.out, i));
      double* dq = g.dq.head(b_, h_) + i * g.dq.stride_n;
      for (int64_t row = 0; row < count(); ++row) {
        const int64_t j = keys_[row];
        const double *k = at(call_.k, j), *v = at(call_.v, j);
        const double p = weight(row, lse), kept = p * factor(i, row), dp = dot(dout, v);
        const double ds = p * (dp * factor(i, row) * head_scale() - delta);
        double *dk = g.dk.head(b_, h_) + j * g.dk.stride_n;
        double *dv = g.dv.head(b_, h_) + j * g.dv.stride_n;
        dhead_scale += kept * dp;
        if (dbias.data) dbias.data[i * dbias.l + j * dbias.s] += ds;
        for (int64_t d = 0; d < call_.D; ++d) {
          dq[d] += ds * call_.scale * k[d];
          dk[d] += ds * call_.scale * q[d];
          dv[d] += kept * head_scale() * dout[d];
        }
      }
    }
    if (g.dhead_scale) g.dhead_scale[b_ * call_.H + h_] = dhead_scale;
  }

 private:
  int64_t count() const { return static_cast<int64_t>(keys_.size()); }
  double head_scale() const { return call_.head_scale ? call_.head_scale[h_] : 1.0; }

  const double* at(const HeadsOf<const double>& t, int64_t n) const {
    return t.head(b_, h_) + n * t.stride_n;
  }

  void clear(const HeadsOf<double>& t, int64_t rows) const {
    for (int64_t n = 0; n < rows; ++n) {
      std::fill_n(t.head(b_, h_) + n * t.stride_n, call_.D, 0.0);
    }
  }

  double dot(const double* a, const double* b) const {
    double sum = 0;
    for (int64_t d = 0; d < call_.D; ++d) sum += a[d] * b[d];
    return sum;
  }

  // the logits of query i into p_
  void logits(int64_t i) {
    for (int64_t row = 0; row < count(); ++row) {
      const int64_t j = keys_[row];
      p_[row] = dot(at(call_.q, i), at(call_.k, j)) * call_.scale;
      const int64_t* stride = call_.bias_stride;
      if (call_.bias) {
        p_[row] += call_.bias[b_ * stride[0] + h_ * stride[1] + i * stride[2] + j * stride[3]];
      }
    }
  }

  double weight(int64_t row, double lse) const {
    return std::exp(p_[row] - (lse == -INFINITY ? 0.0 : lse));
  }

  double factor(int64_t i, int64_t row) const {
    if (keep_.empty()) return 1.0;
    const bool kept = keep_[row * (padded(call_.L) / PAD) + i / PAD] >> (i % PAD) & 1;
    return kept ? call_.keep_factor : 0.0;
  }

  const Call& call_;
  const int64_t b_, h_;
  std::vector<int64_t> keys_;
  std::vector<uint16_t> keep_;
  std::vector<double> p_;  // logits of the kept keys
};
