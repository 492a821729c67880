// Adam: Kingma & Ba 2015, arXiv:1412.6980, Alg. 1.  AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2.
// AMSGrad: Reddi et al. 2018, arXiv:1904.09237, as torch.optim has it: the running maximum is of the uncorrected v.
#pragma once
#include "layer.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

struct AdamHyper {
  double beta1, beta2, eps, weight_decay;
};

// lr is step size / (1 - beta1^t); rsqrt_bias2 is 1 / sqrt(1 - beta2^t); w1 = 1 - beta1, w2 = 1 - beta2.
// Decoupled decay subtracts shrink * p, so that lr * weight_decay below half an ulp of 1 is not lost in 1 - lr * wd.
template <class S>
struct AdamCoeffs {
  S lr, shrink, l2, beta1, w1, beta2, w2, eps, rsqrt_bias2;
};

template <bool kDecoupled, bool kAmsgrad>
struct AdamRule : Elementwise {
  static constexpr int kStates = kAmsgrad ? 3 : 2, kNonNegative = 0b110;
  using Hyper = AdamHyper;
  template <class S>
  using Coeffs = AdamCoeffs<S>;

  FUSEDAMP_FN static AdamCoeffs<double> coeffs(const Hyper& h, double lr, int64_t t) {
    const double bias1 = 1.0 - powi(h.beta1, t), bias2 = 1.0 - powi(h.beta2, t);
    return {lr / bias1,
            kDecoupled ? lr * h.weight_decay : 0.0,
            kDecoupled ? 0.0 : h.weight_decay,
            h.beta1,
            1.0 - h.beta1,
            h.beta2,
            1.0 - h.beta2,
            h.eps,
            1.0 / sqrt(bias2)};
  }

  template <class V>
  FUSEDAMP_FN static V step(const AdamCoeffs<V>& k, V g, V& p, V (&s)[kStates]) {
    V &m = s[0], &v = s[1];
    if (kDecoupled) {
      p = fma(-k.shrink, p, p);
    } else {
      g = fma(k.l2, p, g);
    }
    m = fma(k.beta1, m, k.w1 * g);
    v = fma(k.beta2, v, (k.w2 * g) * g);
    V root = v;
    if constexpr (kAmsgrad) root = s[kStates - 1] = maximum(s[kStates - 1], v);
    return m / fma(sqrt(root), k.rsqrt_bias2, k.eps);
  }
};

using AdamW = AdamRule<true, false>;
using AdamWAmsgrad = AdamRule<true, true>;
using Adam = AdamRule<false, false>;
using AdamAmsgrad = AdamRule<false, true>;

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
