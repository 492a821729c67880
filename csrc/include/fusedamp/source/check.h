// Results of the gradient check (finite check and norm): one op for gradients on the scale's device, otherwise several
// operations.
#pragma once
#include "clipping.h"

namespace fusedamp::detail {

// What checking scaled gradients found, and the clipping that the step will apply; valid until one is modified.
struct Check {
  GradCheck found;
  std::vector<int64_t> positions;  // of the gradients' parameters
  std::optional<Clip> clip;
  Stamp stamp;  // of the scale and of the gradients

  Tensor clip_coef() const { return clip ? found.clip_coef : Tensor(); }
};

// The same from several operations.
struct CheckByParts {
  Gradients gradients;
  ByDevice<GradStats> stats;
  Tensor inv_scale;
  double norm_type;
  Stamp stamp;
  std::vector<Clip> clips = {};
  Tensor clip_coef = {};  // FP64

  // Adds one deferred clipping; returns the norm after the earlier ones.
  Tensor add(const Clip& clip) {
    const Tensor norm = gradients.norm(stats, clip.norm_type, inv_scale.device(), clip_coef);
    const Tensor coefficient = clip.coefficient(norm);
    clip_coef = clip_coef.defined() ? clip_coef * coefficient : coefficient;
    clips.push_back(clip);
    return norm.to(gradients.widest());
  }

  PerDevice flags() const {
    PerDevice flags;
    for (const auto& [device, stat] : stats) flags.of(device) = stat.found_inf;
    return flags;
  }
};

inline Tensors with_scale(const Tensor& scale, Tensors grads) {
  grads.insert(grads.begin(), scale);
  return grads;
}

// Checks gradients with one op, and computes the coefficient of one clipping; nothing if they, or its max_norm, are not
// on the scale's device.
inline std::optional<Check> check_at_once(const Tensors& params, const Tensor& scale, const std::optional<Clip>& clip,
                                          LargestGradient* largest) {
  const Clip by = clip.value_or(Clip());
  const Gradients gradients(params, by.norm_type != 2.0);
  if (gradients.by_device.size() != 1 || gradients.by_device[0].first != scale.device() || !by.is_for(scale.device()))
    return std::nullopt;
  const auto& bucket = gradients.by_device[0].second;
  const Tensor rows = grad_rows(bucket.tensors);
  if (!rows.defined()) return std::nullopt;
  const Numerics numerics = largest ? largest->numerics(scale.device(), bucket.tensors.size()) : Numerics();
  return Check{check_grads(rows, scale, by.norm_type, by.max_norm, by.max_norm_tensor,
                           gradients.widest() == at::kDouble, numerics),
               bucket.positions, clip, Stamp(with_scale(scale, gradients.originals))};
}

// Checks any gradients, for norms of one type.
inline CheckByParts check_by_parts(const Tensors& params, const Tensor& scale, double norm_type,
                                   LargestGradient* largest) {
  Gradients gradients(params, norm_type != 2.0);
  const Tensor inv_scale = inverse_of(scale);
  auto stats = gradients.stats(inv_scale, norm_type, largest);
  Stamp stamp(with_scale(scale, gradients.originals));
  return {std::move(gradients), std::move(stats), inv_scale, norm_type, std::move(stamp)};
}

}  // namespace fusedamp::detail
