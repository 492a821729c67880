// RMSprop: Tieleman & Hinton 2012, "Lecture 6.5", with torch.optim.RMSprop's momentum and eps outside of the root.
// Centered: Graves 2013, arXiv:1308.0850, eq. 38 to 41: the root of the variance.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

struct RmsPropHyper {
  double alpha, eps, weight_decay, momentum;
};

// w = 1 - alpha.
template <class S>
struct RmsPropCoeffs {
  S lr, l2, alpha, w, eps, momentum;
};

// States: the mean square; where centered, the mean; with momentum, its buffer.
template <bool kCentered, bool kMomentum>
struct RmsPropRule : Elementwise {
  static constexpr int kStates = 1 + (kCentered ? 1 : 0) + (kMomentum ? 1 : 0), kNonNegative = 0b1;
  using Hyper = RmsPropHyper;
  template <class S>
  using Coeffs = RmsPropCoeffs<S>;

  FUSEDAMP_FN static RmsPropCoeffs<double> coeffs(const Hyper& h, double lr, int64_t) {
    return {lr, h.weight_decay, h.alpha, 1.0 - h.alpha, h.eps, h.momentum};
  }

  template <class V>
  FUSEDAMP_FN static V step(const RmsPropCoeffs<V>& k, V g, V& p, V (&s)[kStates]) {
    g = fma(k.l2, p, g);
    s[0] = fma(k.alpha, s[0], (k.w * g) * g);
    V square = s[0];
    if (kCentered) {
      V& mean = s[kCentered ? 1 : 0];
      mean = fma(k.alpha, mean, k.w * g);
      square = maximum(fma(-mean, mean, square), V(0));  // rounding must not make it negative
    }
    const V u = g / (sqrt(square) + k.eps);
    if (!kMomentum) return u;
    V& buffer = s[kStates - 1];
    return buffer = fma(k.momentum, buffer, u);
  }
};

using RmsProp = RmsPropRule<false, false>;
using RmsPropMomentum = RmsPropRule<false, true>;
using RmsPropCentered = RmsPropRule<true, false>;
using RmsPropCenteredMomentum = RmsPropRule<true, true>;

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
