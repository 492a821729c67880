// NAdam: Dozat 2016, "Incorporating Nesterov Momentum into Adam", Alg. 2, with torch.optim.NAdam's schedule of
// momentum.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// decay_base is 0.96^momentum_decay: momentum t is beta1 * (1 - decay_base^t / 2).
struct NAdamHyper {
  double beta1, beta2, eps, weight_decay, decoupled, decay_base;
};

// g_part and m_part: coefficients of the gradient and of the first moment in the update.
template <class S>
struct NAdamCoeffs {
  S lr, shrink, l2, beta1, w1, beta2, w2, eps, rsqrt_bias2, g_part, m_part;
};

// The scalar is the product of all momentums so far.
struct NAdam {
  static constexpr int kStates = 2, kNonNegative = 0b10, kScalars = 1, kNorms = 0;
  using Hyper = NAdamHyper;
  template <class S>
  using Coeffs = NAdamCoeffs<S>;

  FUSEDAMP_FN static double momentum(const Hyper& h, int64_t t) {
    return h.beta1 * (1.0 - 0.5 * powi(h.decay_base, t));
  }
  FUSEDAMP_FN static double next_scalar(const Hyper& h, const Layer& layer) {
    return layer.scalar * momentum(h, layer.t);
  }

  FUSEDAMP_FN static NAdamCoeffs<double> coeffs(const Hyper& h, double lr, const Layer& layer) {
    const double product = next_scalar(h, layer), next = momentum(h, layer.t + 1);
    const bool decoupled = h.decoupled != 0.0;
    return {lr,
            decoupled ? lr * h.weight_decay : 0.0,
            decoupled ? 0.0 : h.weight_decay,
            h.beta1,
            1.0 - h.beta1,
            h.beta2,
            1.0 - h.beta2,
            h.eps,
            1.0 / sqrt(1.0 - powi(h.beta2, layer.t)),
            (1.0 - momentum(h, layer.t)) / (1.0 - product),
            next / (1.0 - product * next)};
  }

  template <class V>
  FUSEDAMP_FN static V step(const NAdamCoeffs<V>& k, V g, V& p, V (&s)[2]) {
    V &m = s[0], &v = s[1];
    p = fma(-k.shrink, p, p);
    g = fma(k.l2, p, g);
    m = fma(k.beta1, m, k.w1 * g);
    v = fma(k.beta2, v, (k.w2 * g) * g);
    return fma(k.g_part, g, k.m_part * m) / fma(sqrt(v), k.rsqrt_bias2, k.eps);
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
