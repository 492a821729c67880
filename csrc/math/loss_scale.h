// Dynamic loss scaling: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2, with torch.amp.GradScaler's growth and
// backoff, a floor, a ceiling, and hysteresis: the number of overflows until the scale backs off.
#pragma once
#include "vocab.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

struct LossScaleRule {
  double growth_factor, backoff_factor, min_scale, max_scale;
  int64_t growth_interval, hysteresis;
  bool refill_on_good_step;  // else the budget is refilled when the scale grows
};

struct LossScaleState {
  float scale;
  int32_t growth_tracker, budget;  // budget: remaining overflows, including the one that backs off
};

FUSEDAMP_FN LossScaleState next_loss_scale(const LossScaleRule& rule, LossScaleState s, bool overflow) {
  constexpr float kLargest = 3.40282346638528859812e38f;
  if (overflow) {
    s.growth_tracker = 0;
    if (s.budget > 0) --s.budget;
    if (s.budget <= 0) {
      const float lower = static_cast<float>(s.scale * rule.backoff_factor);
      const float floor = static_cast<float>(rule.min_scale);
      // The floor never raises a scale that the user set below it.
      s.scale = lower >= floor ? lower : (s.scale < floor ? s.scale : floor);
    }
    return s;
  }
  const auto refill = static_cast<int32_t>(rule.hysteresis);
  if (rule.refill_on_good_step) s.budget = refill;
  // Not ==: the interval may have been lowered below the count.
  if (s.growth_tracker < rule.growth_interval - 1) {
    ++s.growth_tracker;
  } else {
    const float higher = static_cast<float>(s.scale * rule.growth_factor);
    const float ceiling = static_cast<float>(rule.max_scale);
    if (higher <= ceiling) {
      if (higher <= kLargest) s.scale = higher;
    } else if (s.scale < ceiling) {
      s.scale = ceiling;
    }
    s.growth_tracker = 0;
    s.budget = refill;
  }
  return s;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
