// Clips by the total norm: immediately for any gradients, or as a coefficient for a fused step.
#pragma once
#include "gradients.h"

namespace fusedamp::detail {

// One clipping by the total norm.
struct Clip {
  double max_norm = INFINITY;
  Tensor max_norm_tensor;  // if it is defined, read on the device instead
  double norm_type = 2.0;

  // Whether an op on `device` takes it.
  bool is_for(c10::Device device) const {
    const Tensor& t = max_norm_tensor;
    return !t.defined() || (t.device() == device && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble));
  }

  // min(1, max_norm / (norm + 1e-6)): 0-d, FP64, on the norm's device; no wait.
  Tensor coefficient(const Tensor& norm) const {
    const Tensor beyond = norm + 1e-6;
    if (!max_norm_tensor.defined()) return (beyond.reciprocal() * max_norm).clamp_max(1.0);
    return (on(max_norm_tensor.detach(), norm.device()).to(at::kDouble).reshape({}) / beyond).clamp_max(1.0);
  }
};

inline double checked_norm_type(const std::string& where, double norm_type) {
  if (!(norm_type >= 0)) refuse(where, "norm_type", norm_type, "a number >= 0, or inf for the largest element");
  return norm_type;
}
inline Clip checked_clip(const std::string& op, double max_norm, double norm_type) {
  const std::string where = "[" + op + "]";
  if (!(max_norm >= 0)) refuse(where, "max_norm", max_norm, "a number >= 0 (inf only measures the norm)");
  return {max_norm, {}, checked_norm_type(where, norm_type)};
}
inline Clip checked_clip(const std::string& op, const Tensor& max_norm, double norm_type) {
  const std::string where = "[" + op + "]";
  need_number(where, "max_norm", max_norm);
  return {0.0, max_norm, checked_norm_type(where, norm_type)};
}

// Clips FP32 and 16-bit gradients on one device by two ops; an undefined tensor for any others.
inline Tensor clip_at_once(const Gradients& gradients, const Gradients& read, const Clip& clip) {
  if (gradients.by_device.size() != 1 || read.has_copies() || gradients.widest() == at::kDouble) return {};
  const auto& [device, bucket] = gradients.by_device[0];
  const Tensor rows = clip.is_for(device) ? grad_rows(bucket.tensors) : Tensor();
  if (!rows.defined()) return {};
  const Tensor one = at::ones({}, options(device, at::kFloat));
  const GradCheck found = check_grads(rows, one, clip.norm_type, clip.max_norm, clip.max_norm_tensor, false);
  unscale_(bucket.tensors, found.clip_coef, one);
  return found.norm;
}

inline Tensor clip_now(const Tensors& params, const Clip& clip, bool error_if_nonfinite = false) {
  const Lasting guard;
  const Gradients gradients(params);
  if (gradients.by_device.empty()) return at::zeros({}, at::kFloat);
  // Absolute values of complex gradients, which other norms than 2 need, are read only.
  const Gradients read = clip.norm_type == 2.0 ? gradients : Gradients(params, true);
  if (!error_if_nonfinite) {
    const Tensor norm = clip_at_once(gradients, read, clip);
    if (norm.defined()) return norm;
  }
  const Tensor norm = read.norm(read.stats({}, clip.norm_type), clip.norm_type, gradients.by_device[0].first);
  if (error_if_nonfinite && !std::isfinite(norm.item<double>()))
    refuse(text("The total norm of order ", repr(clip.norm_type),
                " for gradients from `parameters` is non-finite, so it cannot be clipped. To disable this error and "
                "scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"));
  gradients.multiply_(clip.coefficient(norm));
  return norm.to(gradients.widest());
}

}  // namespace fusedamp::detail
