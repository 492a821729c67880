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

// Of codes as words of 32 bits, of negative ones in two's complement. F, W: float and uint32_t, or vectors of them.
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

  // What stands for 0 in a block whose scale is 0, and for all values where it is NaN.
  static constexpr uint32_t kZero = kNonNegative ? 1 : 0;

  static constexpr uint32_t kBelow = 0x7e800000u;  // the bits of 2^126, the largest scale

  // `largest`: the bits of the block's largest magnitude.
  FUSEDAMP_FN static float scale(uint32_t largest) {
    const uint32_t power = (largest + kRoom) & 0x7f800000u;  // room to round up
    const bool poisoned = kNonNegative ? largest > 0x7f800000u : largest >= 0x7f800000u;
    return float_of(poisoned ? 0x7fc00000u : power < kBelow ? power : kBelow);
  }
  // The factor of values: 1 / scale, or 0.
  FUSEDAMP_FN static float inverse(float scale) {
    const uint32_t power = bits_of(scale);
    return float_of(power == 0u || power > 0x7f800000u ? 0u : 0x7f000000u - power);
  }

  // The code of a value in a block whose scale is not NaN. `random`: 16 bits. In fixed point with 16 binary places, to
  // which the random bits are added, so nothing but a multiplication can round.
  FUSEDAMP_FN static uint32_t code(float value, float inverse, uint32_t random) {
    const uint32_t u = bits_of(value * inverse), magnitude = u & 0x7fffffffu;
    return coded<float>(u, magnitude < kTop ? magnitude : kTop, random);
  }
  // The same in a block whose values are all below kBelow: its scale has room for them.
  template <class F, class W>
  FUSEDAMP_FN static W code_below(F value, F inverse, W random) {
    static_assert(sizeof(F) == sizeof(W), "words of 32 bits");
    const W u = bits_of(value * inverse);
    return coded<F, W>(u, u & 0x7fffffffu, random);
  }
  // The nearest code, in any block.
  FUSEDAMP_FN static uint32_t nearest(float value, float scale, float inverse) {
    return scale == scale ? code(value, inverse, 0x8000u) : kZero;
  }
  // The value of a code, which is given times 2^kPlaces.
  template <int kPlaces, class F, class W>
  FUSEDAMP_FN static F value(W code, F scale) {
    static_assert(sizeof(F) == sizeof(W), "words of 32 bits");
    constexpr uint32_t offset = kBias + (static_cast<uint32_t>(kPlaces) << 23);
    const W u = bits_of(converted(code)), magnitude = kNonNegative ? u : u & 0x7fffffffu;
    const F tapered = float_of((larger(magnitude, offset) - offset) << kShift);
    const F even = float_of(magnitude) * (1.0f / (kSteep * static_cast<float>(1 << kPlaces)));
    const F x = larger(tapered, even);
    if constexpr (kNonNegative) return x * scale;
    return float_of(bits_of(x) | (u & 0x80000000u)) * scale;
  }

 private:
  template <class F, class W>
  FUSEDAMP_FN static W coded(W u, W x, W random) {
    const F tapered = float_of((x >> kShift) + (kBias + (16u << 23))), even = float_of(x) * (kSteep * 0x1p16f);
    const W code = (truncated(smaller(tapered, even)) + random) >> 16;
    if constexpr (kNonNegative) return larger(code, kZero);
    const W sign = 0u - (u >> 31);
    return (code ^ sign) - sign;
  }
};

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
