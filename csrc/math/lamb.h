// LAMB: You et al. 2020, arXiv:1904.00962, Alg. 2: Adam's direction, scaled to the size of the tensor's weights.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// trust_clip bounds the ratio of the two norms; where adapt is 0, it is 1.
struct LambHyper {
  double beta1, beta2, eps, weight_decay, bias_correction, trust_clip, adapt;
};

template <class S>
struct LambCoeffs {
  S lr, decay, beta1, w1, beta2, w2, eps, inv_bias1, rsqrt_bias2;
};

struct Lamb {
  static constexpr int kStates = 2, kNonNegative = 0b10, kScalars = 0, kNorms = 2;
  using Hyper = LambHyper;
  template <class S>
  using Coeffs = LambCoeffs<S>;

  FUSEDAMP_FN static LambCoeffs<double> coeffs(const Hyper& h, double lr, const Layer& layer) {
    const bool corrected = h.bias_correction != 0.0;
    const double ratio = norm_ratio(layer.squares[0], layer.squares[1]);
    const double trust = h.adapt == 0.0 ? 1.0 : ratio < h.trust_clip ? ratio : h.trust_clip;
    return {lr * trust,
            h.weight_decay,
            h.beta1,
            1.0 - h.beta1,
            h.beta2,
            1.0 - h.beta2,
            h.eps,
            corrected ? 1.0 / (1.0 - powi(h.beta1, layer.t)) : 1.0,
            corrected ? 1.0 / sqrt(1.0 - powi(h.beta2, layer.t)) : 1.0};
  }

  template <class V>
  FUSEDAMP_FN static V step(const LambCoeffs<V>& k, V g, V& p, V (&s)[2]) {
    V &m = s[0], &v = s[1];
    m = fma(k.beta1, m, k.w1 * g);
    v = fma(k.beta2, v, (k.w2 * g) * g);
    return fma(k.decay, p, (k.inv_bias1 * m) / fma(sqrt(v), k.rsqrt_bias2, k.eps));
  }

  template <class V>
  FUSEDAMP_FN static void measure(const LambCoeffs<V>& k, V g, V p, V (&s)[2], V (&x)[2]) {
    x[0] = p;
    x[1] = step(k, g, p, s);
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
