// Clips gradients by their total norm.
#include "../clip.h"

#include "clipping.h"

namespace fusedamp {

using at::Tensor;

Tensor clip_grad_norm_(const std::vector<Tensor>& params, double max_norm, double norm_type, bool error_if_nonfinite) {
  return detail::clip_now(params, detail::checked_clip("clip_grad_norm_", max_norm, norm_type), error_if_nonfinite);
}
Tensor clip_grad_norm_(const std::vector<Tensor>& params, const Tensor& max_norm, double norm_type,
                       bool error_if_nonfinite) {
  return detail::clip_now(params, detail::checked_clip("clip_grad_norm_", max_norm, norm_type), error_if_nonfinite);
}
Tensor clip_grad_norm_(const Tensor& param, double max_norm, double norm_type, bool error_if_nonfinite) {
  return clip_grad_norm_(std::vector<Tensor>{param}, max_norm, norm_type, error_if_nonfinite);
}
Tensor clip_grad_norm_(const Tensor& param, const Tensor& max_norm, double norm_type, bool error_if_nonfinite) {
  return clip_grad_norm_(std::vector<Tensor>{param}, max_norm, norm_type, error_if_nonfinite);
}

}  // namespace fusedamp
