// What a 16-bit weight alone does not feel: an update that rounds away.
#pragma once
#include "rounding.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// Whether `half`, a widened 16-bit number, plus `update` in FP32 rounds to `half` again: to nearest even, and to the
// bit, so that 0 does not absorb what makes it -0. NaN absorbs nothing. Without branches, for loops of vectors.
FUSEDAMP_FN bool bf16_absorbs(float half, float update) {
  const float sum = half + update;
  const uint32_t u = bits_of(sum), nearest = u + 0x7fffu + ((u >> 16) & 1u);
  return ((nearest & 0xffff0000u) == bits_of(half)) & (sum == sum);
}

// Adding 1.5 * 2^23 units in the last place of the sum as FP16 rounds it to a whole number of them. If the sum is
// infinite, its exponent overflows to a tiny number, which does not change it. What is beyond FP16 is not `half`.
FUSEDAMP_FN bool f16_absorbs(float half, float update) {
  const float sum = half + update;
  const uint32_t exponent = bits_of(sum) & 0x7f800000u, least = 0x38800000u;  // subnormals: the unit of 2^-14
  const float rounder = float_of((exponent < least ? least : exponent) + (13u << 23) + 0x400000u);
  const bool same_sign = static_cast<int32_t>(bits_of(sum) ^ bits_of(half)) >= 0;
  return ((sum + rounder) - rounder == half) & same_sign;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
