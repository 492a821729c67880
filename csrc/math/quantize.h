// States in 8 bits: codes relative to a power of two for each block of kScaleBlock neighbours (block-wise scales:
// Dettmers et al. 2022, arXiv:2110.02861).
//
// Codes are tapered: 32 (non-negative states) or 16 (signed ones) per octave for the 4 octaves below the block's
// largest magnitude, half as many for the next 4, and so on; the last few codes are evenly spaced down to 0. (Evenly
// spaced codes throughout would round a small gradient's momentum up to a step of its large neighbour's, and divide it
// by its own small second moment.) Codes are even between neighbouring powers of two, so the step from a value to its
// code is a shift of its bits, the probability of rounding up is linear in the value, and the mean of stochastic
// rounding is the value, to 2^-16 of a step. Code 0 is excluded for states that are never negative: a second moment
// that rounds to 0 beside a first moment that does not is a division by eps.
//
// The scale is FP32. 0: all values of the block are below 2^-126. NaN: one was NaN, or infinite in a signed state, and
// all of them become NaN, which the step after this one shows. In a state that is never negative infinity saturates to
// the largest value that a code can have: a square overflows where its gradient is finite (1e21), and the FP32 state
// would hold its own element still, not the other 127.
#pragma once
#include "random.h"
#include "rounding.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

constexpr int64_t kScaleBlock = 128;

template <bool kNonNegative>
struct CodeType {
  using type = int8_t;
};
template <>
struct CodeType<true> {
  using type = uint8_t;
};
template <bool kNonNegative>
using CodeOf = typename CodeType<kNonNegative>::type;

template <bool kNonNegative>
struct Codes {
  // Values are divided by the scale, to 0 <= x < 2. Code y stands for the x where float(y) has the bits of x, shifted
  // by kShift, plus kBias; below 4 for y / kSteep.
  static constexpr int kShift = 2;  // 2^kShift octaves share a density of codes
  static constexpr uint32_t kEnd = kNonNegative ? 0x43800000u : 0x43000000u;  // the bits of 256 or 128: the code of 2
  static constexpr uint32_t kHighest = kNonNegative ? 0x437f0000u : 0x42fe0000u;  // of 255 or 127
  static constexpr uint32_t kBias = kEnd - (0x40000000u >> kShift);
  static constexpr uint32_t kTop = (kHighest - kBias) << kShift;         // of the x of the highest code
  static constexpr float kSteep = kNonNegative ? 0x1p25f : 0x1p21f;      // 4 / the x of code 4
  static constexpr uint32_t kRoom = kNonNegative ? 1u << 18 : 1u << 19;  // a step of the code below 2, as bits

  // `largest`: the bits of the block's largest magnitude.
  FUSEDAMP_FN static float scale(uint32_t largest) {
    const uint32_t power = (largest + kRoom) & 0x7f800000u;  // room to round up
    const bool poisoned = kNonNegative ? largest > 0x7f800000u : largest >= 0x7f800000u;
    return float_of(poisoned ? 0x7fc00000u : power < 0x7e800000u ? power : 0x7e800000u);
  }
  // What values are multiplied by: 1 / scale, or 0.
  FUSEDAMP_FN static float inverse(float scale) {
    const uint32_t power = bits_of(scale);
    return float_of(power == 0u || power > 0x7f800000u ? 0u : 0x7f000000u - power);
  }

  // `random`: 16 bits.
  FUSEDAMP_FN static int32_t code(float value, float inverse, uint32_t random) {
    const uint32_t u = bits_of(value * inverse), magnitude = u & 0x7fffffffu;
    const bool negative = (u >> 31) != 0u && magnitude <= 0x7f800000u;  // the sign of a NaN is up to the compiler
    const uint32_t x = magnitude < kTop ? magnitude : kTop;
    const float tapered = float_of((x >> kShift) + kBias), even = float_of(x) * kSteep;
    const float dither = static_cast<float>(static_cast<int32_t>(random)) * 0x1p-16f;
    const int32_t code = static_cast<int32_t>((tapered < even ? tapered : even) + dither);
    if (kNonNegative) return code > 1 ? code : 1;
    return negative ? -code : code;
  }
  // The nearest code. In a block whose scale is NaN all values are, whatever their codes: those of 0.
  FUSEDAMP_FN static int32_t nearest(float value, float scale, float inverse) {
    return code(scale == scale ? value : 0.0f, inverse, 0x8000u);
  }
  FUSEDAMP_FN static float value(int32_t code, float scale) {
    const float y = static_cast<float>(code);
    const uint32_t sign = bits_of(y) & 0x80000000u, magnitude = bits_of(y) & 0x7fffffffu;
    const float tapered = float_of(((magnitude > kBias ? magnitude : kBias) - kBias) << kShift);
    const float even = float_of(magnitude) * (1.0f / kSteep);
    const float x = tapered > even ? tapered : even;
    return float_of(bits_of(x) | sign) * scale;
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
