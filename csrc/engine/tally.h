// The tally of one element (table.h, Tally), on every device.
#pragma once
#include "../include/fusedamp/rows.h"
#include "../math/absorb.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// kHalf: f16 or bf16 if the weight was `half` before it was widened; f32 if weights are not 16-bit.
template <DType kHalf, class V>
FUSEDAMP_FN void tally_element(V old, V now, float half, double& update, double& weight, uint32_t& moved,
                               uint32_t& lost) {
  const V change = now - old;
  const bool moves = !(now == old);  // also where one of them is NaN
  moved += moves;
  if constexpr (kHalf == DType::f16) lost += moves & f16_absorbs(half, change);
  if constexpr (kHalf == DType::bf16) lost += moves & bf16_absorbs(half, change);
  // In double, so that no square of a float overflows or underflows.
  const double by = change, from = old;
  update = fma(by, by, update);
  weight = fma(from, from, weight);
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
