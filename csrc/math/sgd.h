// SGD with momentum, dampening and Nesterov's look-ahead as torch.optim.SGD defines them
// (Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning").
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

struct SgdHyper {
  double momentum, dampening, weight_decay, nesterov;
};

// g_weight is the gradient's coefficient in the buffer: 1 - dampening, but 1 at a tensor's first step.
template <class S>
struct SgdCoeffs {
  S lr, l2, momentum, g_weight, nesterov;
};

template <bool kMomentum>
struct SgdRule : Elementwise {
  static constexpr int kStates = kMomentum ? 1 : 0, kNonNegative = 0;
  using Hyper = SgdHyper;
  template <class S>
  using Coeffs = SgdCoeffs<S>;

  FUSEDAMP_FN static SgdCoeffs<double> coeffs(const Hyper& h, double lr, int64_t t) {
    return {lr, h.weight_decay, h.momentum, t == 1 ? 1.0 : 1.0 - h.dampening, h.nesterov};
  }

  template <class V>
  FUSEDAMP_FN static V step(const SgdCoeffs<V>& k, V g, V& p, V (&s)[1]) {
    g = fma(k.l2, p, g);
    if (!kMomentum) return g;
    s[0] = fma(k.momentum, s[0], k.g_weight * g);
    return where(k.nesterov != V(0), fma(k.momentum, s[0], g), s[0]);
  }
};

using Sgd = SgdRule<false>;
using SgdMomentum = SgdRule<true>;

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
