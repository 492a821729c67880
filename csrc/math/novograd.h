// NovoGrad: Ginsburg et al. 2019, arXiv:1905.11286, Alg. 1: gradients divided by a running norm of their tensor.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

struct NovoGradHyper {
  double beta1, beta2, eps, weight_decay, grad_averaging;
};

template <class S>
struct NovoGradCoeffs {
  S lr, l2, inv_norm, beta1, g_weight;
};

// The scalar is the second moment: the running mean of the squared norm, which the first step starts.
struct NovoGrad {
  static constexpr int kStates = 1, kNonNegative = 0, kScalars = 1, kNorms = 1;
  using Hyper = NovoGradHyper;
  template <class S>
  using Coeffs = NovoGradCoeffs<S>;

  FUSEDAMP_FN static double next_scalar(const Hyper& h, const Layer& layer) {
    return layer.t == 1 ? layer.squares[0] : fma(h.beta2, layer.scalar, (1.0 - h.beta2) * layer.squares[0]);
  }

  FUSEDAMP_FN static NovoGradCoeffs<double> coeffs(const Hyper& h, double lr, const Layer& layer) {
    const double norm = sqrt(next_scalar(h, layer)) + h.eps;
    return {lr, h.weight_decay, norm == 0.0 ? 0.0 : 1.0 / norm, h.beta1, h.grad_averaging != 0.0 ? 1.0 - h.beta1 : 1.0};
  }

  template <class V>
  FUSEDAMP_FN static V step(const NovoGradCoeffs<V>& k, V g, V& p, V (&s)[1]) {
    g = fma(k.l2, p, k.inv_norm * g);
    return s[0] = fma(k.beta1, s[0], k.g_weight * g);
  }

  template <class V>
  FUSEDAMP_FN static void measure(const NovoGradCoeffs<V>&, V g, V, V (&)[1], V (&x)[1]) {
    x[0] = g;
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
