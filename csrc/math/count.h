// Step counts are FP32 numbers, as in torch: exact up to 2^24; from there they increase by FP32's spacing, 2, 4, 8 ...
// So no two steps have the same count or draw the same random numbers.
#pragma once
#include "rounding.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

constexpr float kMostSteps = 0x1p62f;  // largest count; safe in int64 arithmetic

FUSEDAMP_FN float next_count(float count) {
  const float next = count + 1.0f;
  return !(count < kMostSteps) ? count : next > count ? next : float_of(bits_of(count) + 1u);
}

// The number of a step with count `count`, from 1: NaN, negative counts and fractions below 1 give 1. (CPU ops raise
// for them; on a GPU that would need a sync.)
FUSEDAMP_FN int64_t step_number(float count) {
  return count >= 1.0f ? static_cast<int64_t>(count < kMostSteps ? count : kMostSteps) : 1;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
