// Step counts are FP32 numbers, as torch's are: exact up to 2^24, and from there on they go up in FP32's own steps, of
// 2, 4, 8 ... So no two steps have the same count, and none draws the random numbers of another.
#pragma once
#include "rounding.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

constexpr float kMostSteps = 0x1p62f;  // where counts end; int64 and what is computed from it have room for it

FUSEDAMP_FN float next_count(float count) {
  const float next = count + 1.0f;
  return !(count < kMostSteps) ? count : next > count ? next : float_of(bits_of(count) + 1u);
}

// The number of a step whose count is `count`, from 1 on, whatever the count is: NaN, negative and fractions below 1
// are 1. (An op on the CPU refuses them; on a GPU that would mean waiting for it.)
FUSEDAMP_FN int64_t step_number(float count) {
  return count >= 1.0f ? static_cast<int64_t>(count < kMostSteps ? count : kMostSteps) : 1;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
