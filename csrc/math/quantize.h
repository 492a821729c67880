// 8-bit states: quantized values with a power-of-two scale per block of kScaleBlock elements (block-wise scales:
// Dettmers et al. 2022, arXiv:2110.02861).
//
// The grid is nonuniform: 32 (nonnegative states) or 16 (signed states) quantized values per octave for the 4 octaves
// below the block's largest magnitude, half as many for the next 4, and so on; the last few are evenly spaced down to
// 0. (A uniform grid would round a small gradient's momentum up to a step of its large neighbor's, and divide it by
// its own small second moment.) The grid is uniform between adjacent powers of two, so quantizing is a shift of a
// value's bits, the probability of rounding up is linear in the value, and stochastic rounding is unbiased to 2^-16 of
// a step. Nonnegative states have no quantized value 0: a second moment rounded to 0 with a nonzero first moment would
// be a division by eps.
//
// The scale is FP32. 0: all values of the block are below 2^-126. NaN: a value was NaN, or infinite in a signed state;
// then all become NaN, which the next step shows. In a nonnegative state infinity saturates to the largest
// representable value: the square of a finite gradient (1e21) can overflow, and in an FP32 state it would affect only
// its own element, not the other 127.
#pragma once
#include "random.h"
#include "rounding.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

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
  // Values are divided by the scale, to 0 <= x < 2. Quantized value y represents the x for which float(y) has the bits
  // of x, shifted by kShift, plus kBias; below 4 it represents y / kSteep.
  static constexpr int kShift = 2;  // 2^kShift octaves have the same grid density
  static constexpr uint32_t kEnd = kNonNegative ? 0x43800000u : 0x43000000u;      // the bits of 256 or 128: 2 quantized
  static constexpr uint32_t kHighest = kNonNegative ? 0x437f0000u : 0x42fe0000u;  // of 255 or 127
  static constexpr uint32_t kBias = kEnd - (0x40000000u >> kShift);
  static constexpr uint32_t kTop = (kHighest - kBias) << kShift;         // of the x of the largest quantized value
  static constexpr float kSteep = kNonNegative ? 0x1p25f : 0x1p21f;      // 4 / the x of quantized value 4
  static constexpr uint32_t kRoom = kNonNegative ? 1u << 18 : 1u << 19;  // a step of the grid below 2, as bits

  // `largest`: the bits of the block's largest magnitude.
  FUSEDAMP_FN static float scale(uint32_t largest) {
    const uint32_t power = (largest + kRoom) & 0x7f800000u;  // room to round up
    const bool poisoned = kNonNegative ? largest > 0x7f800000u : largest >= 0x7f800000u;
    return float_of(poisoned ? 0x7fc00000u : power < 0x7e800000u ? power : 0x7e800000u);
  }
  // The factor of values: 1 / scale, or 0.
  FUSEDAMP_FN static float inverse(float scale) {
    const uint32_t power = bits_of(scale);
    return float_of(power == 0u || power > 0x7f800000u ? 0u : 0x7f000000u - power);
  }

  // `random`: 16 bits.
  FUSEDAMP_FN static int32_t code(float value, float inverse, uint32_t random) {
    const uint32_t u = bits_of(value * inverse), magnitude = u & 0x7fffffffu;
    const bool negative = (u >> 31) != 0u && magnitude <= 0x7f800000u;  // the sign of a NaN depends on the compiler
    const uint32_t x = magnitude < kTop ? magnitude : kTop;
    const float tapered = float_of((x >> kShift) + kBias), even = float_of(x) * kSteep;
    const float dither = static_cast<float>(static_cast<int32_t>(random)) * 0x1p-16f;
    const int32_t code = static_cast<int32_t>((tapered < even ? tapered : even) + dither);
    if (kNonNegative) return code > 1 ? code : 1;
    return negative ? -code : code;
  }
  // The nearest code. In a block whose scale is NaN all values are, so each is stored as 0.
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
