// Results of the gradient check: 1 / scale, the p-norm, and the clip coefficient of Pascanu et al. 2013,
// arXiv:1211.5063, section 3.2, with the 1e-6 of torch.nn.utils.clip_grad_norm_.
#pragma once
#include "vocab.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// Rounded once: an FP32 division may be inexact on a device.
FUSEDAMP_FN float reciprocal(float scale) { return static_cast<float>(1.0 / static_cast<double>(scale)); }

// The p-norm from sum |x|^p; `total` is the count for p = 0 and the maximum for p = inf. The special cases of torch's
// pow(total, 1 / p) give the same bits.
FUSEDAMP_FN double norm_of(double total, double p) {
  if (p == 0.0 || p - p != 0.0) return total;
  const double exponent = 1.0 / p;
  if (exponent == 1.0) return total;
  if (exponent == 0.5) return sqrt(total);
  if (exponent == 2.0) return total * total;
  if (exponent == 3.0) return total * total * total;
  return pow(total, exponent);
}

// min(1, max_norm / (norm + 1e-6)). NaN stays NaN.
FUSEDAMP_FN double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
