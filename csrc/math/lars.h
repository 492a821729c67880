// LARS: You, Gitman & Ginsburg 2017, arXiv:1708.03888, Alg. 1, with the learning rate outside of the momentum, as in
// torch.optim.SGD.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// Where adapt is 0, the ratio is 1: SGD.
struct LarsHyper {
  double momentum, weight_decay, trust_coefficient, eps, nesterov, adapt;
};

template <class S>
struct LarsCoeffs {
  S lr, l2, ratio, momentum, nesterov;
};

struct Lars {
  static constexpr int kStates = 1, kNonNegative = 0, kScalars = 0, kNorms = 2;
  using Hyper = LarsHyper;
  template <class S>
  using Coeffs = LarsCoeffs<S>;

  FUSEDAMP_FN static LarsCoeffs<double> coeffs(const Hyper& h, double lr, const Layer& layer) {
    double ratio = 1.0;
    if (h.adapt != 0.0 && layer.squares[0] > 0.0 && layer.squares[1] > 0.0) {
      const double weights = sqrt(layer.squares[0]), gradients = sqrt(layer.squares[1]);
      ratio = h.trust_coefficient * weights / (gradients + h.weight_decay * weights + h.eps);
    }
    return {lr, h.weight_decay, ratio, h.momentum, h.nesterov};
  }

  template <class V>
  FUSEDAMP_FN static V step(const LarsCoeffs<V>& k, V g, V& p, V (&s)[1]) {
    g = k.ratio * fma(k.l2, p, g);
    s[0] = fma(k.momentum, s[0], g);
    return where(k.nesterov != V(0), fma(k.momentum, s[0], g), s[0]);
  }

  template <class V>
  FUSEDAMP_FN static void measure(const LarsCoeffs<V>&, V g, V p, V (&)[1], V (&x)[2]) {
    x[0] = p;
    x[1] = g;
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
