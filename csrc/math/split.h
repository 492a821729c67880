// Split masters: an FP32 master in 4 bytes, as the rounded 16-bit weight and a 16-bit remainder.
//
// BF16: the remainder is the lower half of the master's bits as a signed number that is added to the weight's bits. So
// the weight is the master rounded to nearest with ties away from zero, and every FP32 value is restored exactly (NaNs
// as NaNs). Ties to even would not work: 65,537 values would share an even weight. FP16: the weight is the master
// rounded to nearest even, the remainder counts 2^-15 of a unit in the weight's last place. Exact for 2^-16 <= |master|
// < 65520; below, the master is rounded to multiples of 2^-39; from 65520 on, weight and master are infinite.
//
// If a remainder does not fit its weight, the weight was modified, and the master is the weight.
#pragma once
#include "rounding.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

FUSEDAMP_FN bool is_nan_bits(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

FUSEDAMP_FN uint16_t float_to_bf16_away(float x) {
  const uint32_t u = bits_of(x);
  return static_cast<uint16_t>(is_nan_bits(u) ? 0x7fc0u : (u + 0x8000u) >> 16);
}
FUSEDAMP_FN int16_t bf16_remainder(float master) {
  const uint32_t u = bits_of(master);
  return static_cast<int16_t>(is_nan_bits(u) ? 0u : u & 0xffffu);
}
// A weight set to 0 or infinity with an old remainder would give the bits of a NaN; any other weight gives a value that
// rounds to it.
FUSEDAMP_FN float bf16_joined(uint16_t weight, int16_t remainder) {
  const uint32_t upper = static_cast<uint32_t>(weight) << 16;
  const uint32_t u = upper + static_cast<uint32_t>(static_cast<int32_t>(remainder));
  return float_of(is_nan_bits(u) ? upper : u);
}

// 2^-15 of a unit in the last place of an FP16 value, given as a float; subnormal values have the unit of 2^-14.
FUSEDAMP_FN uint32_t f16_unit_bits(float half) {
  const uint32_t exponent = bits_of(half) & 0x7f800000u, least = 0x38800000u;
  return (exponent < least ? least : exponent) - (25u << 23);
}
// A value that rounds to an odd FP16 value is closer than half a unit, because ties go to even; so must be its
// remainder.
FUSEDAMP_FN int16_t f16_remainder(float master, float half) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
  const float per_unit = float_of((254u << 23) - f16_unit_bits(half));
  const auto whole = [](float x) { return static_cast<int32_t>(bits_of(x + kRounder) - bits_of(kRounder)); };
  const int32_t units = whole((master - half) * per_unit), odd = whole(half * (per_unit * 0x1p-15f)) & 1;
  const int32_t most = 16384 - odd, below = units < most ? units : most, kept = below > -most ? below : -most;
  const bool finite = (bits_of(half) & 0x7f800000u) != 0x7f800000u;
  return static_cast<int16_t>(finite ? kept : 0);
}
// Valid if it rounds to the FP16 weight; else the weight was modified, and is the master.
FUSEDAMP_FN float f16_joined(float half, int16_t remainder) {
  return half + static_cast<float>(remainder) * float_of(f16_unit_bits(half));
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
