// Updates an FP32 master after its 16-bit weight was modified: the new master is the weight plus the old remainder (the
// master minus its own rounding) if that rounds to the new weight, else the weight. A split master does this by
// construction; both give the same bits if both can represent the value:
//
// BF16: the remainder is the difference of bits, as in split.h. Only ties differ: halfway between two weights FP32
// masters round to even, split ones away from zero, so a remainder of half a unit fits every second weight here, and
// all of them there. FP16: the remainder is a number in units of the rounded master's last place, and is scaled to that
// of the new weight. Below 2^-16 FP32 masters have digits that split ones do not.
//
// Both functions return the candidate: the caller uses it if it rounds to the new weight (to nearest even), else the
// weight. NaN never does.
#pragma once
#include "split.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// `rounded`: the master as BF16. A NaN has no remainder.
FUSEDAMP_FN float bf16_moved(float master, uint16_t rounded, uint16_t weight) {
  const uint32_t u = bits_of(master), remainder = u - (static_cast<uint32_t>(rounded) << 16);
  return float_of((static_cast<uint32_t>(weight) << 16) + select(is_nan_bits(u), 0u, remainder));
}

// Whether an FP32 master may become a split one as it is: a tie, too, that the weight was rounded away from zero from.
FUSEDAMP_FN bool bf16_rounds_away_to(float master, uint16_t weight) {
  return bf16_to_float(float_to_bf16_away(master)) == bf16_to_float(weight);
}

// `rounded`: the master as FP16, and `weight`: both widened. All exact, but the sum, which split.h rounds alike.
FUSEDAMP_FN float f16_moved(float master, float rounded, float weight) {
  const float per_unit = float_of((254u << 23) - f16_unit_bits(rounded));
  return weight + (master - rounded) * per_unit * float_of(f16_unit_bits(weight));
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
