// RAdam: Liu et al. 2020, arXiv:1908.03265, Alg. 2, with torch.optim.RAdam's threshold of 5 samples.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

struct RAdamHyper {
  double beta1, beta2, eps, weight_decay, decoupled;
};

// lr holds the first bias correction and, where `adaptive` is 1, the rectification and the second one.
template <class S>
struct RAdamCoeffs {
  S lr, shrink, l2, beta1, w1, beta2, w2, eps, adaptive;
};

struct RAdam : Elementwise {
  static constexpr int kStates = 2, kNonNegative = 0b10;
  using Hyper = RAdamHyper;
  template <class S>
  using Coeffs = RAdamCoeffs<S>;

  FUSEDAMP_FN static RAdamCoeffs<double> coeffs(const Hyper& h, double lr, int64_t t) {
    const double power2 = powi(h.beta2, t), bias1 = 1.0 - powi(h.beta1, t), bias2 = 1.0 - power2;
    const double longest = 2.0 / (1.0 - h.beta2) - 1.0;  // rho_inf; the number of samples that v averages in the limit
    const double length = longest - 2.0 * static_cast<double>(t) * power2 / bias2;  // rho_t
    const bool adaptive = length > 5.0;
    const double rectified =
        sqrt((length - 4.0) * (length - 2.0) * longest * bias2 / ((longest - 4.0) * (longest - 2.0) * length));
    const bool decoupled = h.decoupled != 0.0;
    return {lr / bias1 * (adaptive ? rectified : 1.0),
            decoupled ? lr * h.weight_decay : 0.0,
            decoupled ? 0.0 : h.weight_decay,
            h.beta1,
            1.0 - h.beta1,
            h.beta2,
            1.0 - h.beta2,
            h.eps,
            adaptive ? 1.0 : 0.0};
  }

  template <class V>
  FUSEDAMP_FN static V step(const RAdamCoeffs<V>& k, V g, V& p, V (&s)[2]) {
    V &m = s[0], &v = s[1];
    p = fma(-k.shrink, p, p);
    g = fma(k.l2, p, g);
    m = fma(k.beta1, m, k.w1 * g);
    v = fma(k.beta2, v, (k.w2 * g) * g);
    return m / where(k.adaptive != V(0), sqrt(v) + k.eps, V(1));
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
