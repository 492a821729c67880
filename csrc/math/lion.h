// Lion: Chen et al. 2023, arXiv:2302.06675, Alg. 2.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

struct LionHyper {
  double beta1, beta2, weight_decay;
};

// w1 = 1 - beta1, w2 = 1 - beta2.
template <class S>
struct LionCoeffs {
  S lr, shrink, beta1, w1, beta2, w2;
};

struct Lion : Elementwise {
  static constexpr int kStates = 1, kNonNegative = 0;
  using Hyper = LionHyper;
  template <class S>
  using Coeffs = LionCoeffs<S>;

  FUSEDAMP_FN static LionCoeffs<double> coeffs(const Hyper& h, double lr, int64_t) {
    return {lr, lr * h.weight_decay, h.beta1, 1.0 - h.beta1, h.beta2, 1.0 - h.beta2};
  }

  template <class V>
  FUSEDAMP_FN static V step(const LionCoeffs<V>& k, V g, V& p, V (&s)[1]) {
    V& m = s[0];
    p = fma(-k.shrink, p, p);
    const V u = sign(fma(k.beta1, m, k.w1 * g));  // of the momentum before this step
    m = fma(k.beta2, m, k.w2 * g);
    return u;
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
