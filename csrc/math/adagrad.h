// Adagrad: Duchi, Hazan & Singer 2011, JMLR 12, Fig. 1 (diagonal), with torch.optim's decay of the rate.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

struct AdagradHyper {
  double lr_decay, eps, weight_decay;
};

template <class S>
struct AdagradCoeffs {
  S lr, l2, eps;
};

struct Adagrad : Elementwise {
  static constexpr int kStates = 1, kNonNegative = 0b1;
  using Hyper = AdagradHyper;
  template <class S>
  using Coeffs = AdagradCoeffs<S>;

  FUSEDAMP_FN static AdagradCoeffs<double> coeffs(const Hyper& h, double lr, int64_t t) {
    return {lr / (1.0 + static_cast<double>(t - 1) * h.lr_decay), h.weight_decay, h.eps};
  }

  template <class V>
  FUSEDAMP_FN static V step(const AdagradCoeffs<V>& k, V g, V& p, V (&s)[1]) {
    V& sum = s[0];
    g = fma(k.l2, p, g);
    sum = fma(g, g, sum);
    return g / (sqrt(sum) + k.eps);
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
