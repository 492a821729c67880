// Finishes a gradient check on every device: one thread, after the gradients have been summed.
#pragma once
#include "../math/clip.h"
#include "../math/rounding.h"
#include "table.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

FUSEDAMP_FN double max_norm_of(const GradCheck& check) {
  const void* at = check.max_norm_tensor;
  if (!at) return check.max_norm;
  switch (check.max_norm_dtype) {
    case DType::f64: return *static_cast<const double*>(at);
    case DType::f32: return *static_cast<const float*>(at);
    case DType::bf16: return bf16_to_float(*static_cast<const uint16_t*>(at));
    default: return f16_to_float(*static_cast<const uint16_t*>(at));
  }
}

// `total`: the result of the reduction over gradients times reciprocal(*check.scale).
FUSEDAMP_FN void conclude(const GradCheck& check, double total) {
  const double norm = norm_of(total, check.norm_type);
  *check.inv_scale = reciprocal(*check.scale);
  *check.clip_coef = static_cast<float>(clip_coefficient(norm, max_norm_of(check)));
  if (check.wide) {
    *static_cast<double*>(check.norm) = norm;
  } else {
    *static_cast<float*>(check.norm) = static_cast<float>(norm);
  }
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
