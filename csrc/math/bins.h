// Magnitudes as bits: FP16's least normal number in every format, and 64 bins, one for each power of two from 2^-40 to
// 2^19.
#pragma once
#include "rounding.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

constexpr int kBins = 64, kBinBits = 6;

// A binary format of IEEE 754 in words of its size: sign, exponent, mantissa.
template <class W, int kExponentBits>
struct Binary {
  using Word = W;
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr int kMantissaBits = 8 * static_cast<int>(sizeof(Word)) - 1 - kExponentBits;
  static constexpr Word kMagnitude = static_cast<Word>(static_cast<Word>(~Word{0}) >> 1);
  static constexpr Word kMostExponent = (Word{1} << kExponentBits) - 1;
  static constexpr Word kInfinity = kMostExponent << kMantissaBits;
  static constexpr Word kLeastHalf = static_cast<Word>(kBias - 14) << kMantissaBits;  // 2^-14

  // 0: zero; 1: below 2^-40; e + 42 for e = floor(log2 |x|) in -40..19; 62: finite from 2^20 on; 63: infinite or NaN.
  // For formats whose subnormal numbers are below 2^-40: not for FP16.
  static FUSEDAMP_FN Word bin(Word bits) {
    static_assert(kBias > 41, "subnormal numbers are below the bins");
    constexpr Word kLeast = kBias - 41, kMost = kBias + 20;
    const Word magnitude = static_cast<Word>(bits << 1), exponent = static_cast<Word>(magnitude >> (kMantissaBits + 1));
    const Word above = exponent > kLeast ? exponent : kLeast, clamped = above < kMost ? above : kMost;
    return static_cast<Word>(clamped - kLeast + (magnitude != 0) + (exponent == kMostExponent));
  }
};
using Half = Binary<uint16_t, 5>;
using BFloat16 = Binary<uint16_t, 8>;
using Single = Binary<uint32_t, 8>;
using Double = Binary<uint64_t, 11>;

FUSEDAMP_FN uint64_t bits_of(double x) {
  uint64_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
FUSEDAMP_FN uint32_t bin_of(float x) { return Single::bin(bits_of(x)); }
// The same of a number that FP16 has: 0, or not below 2^-24 and, where finite, below 2^16.
FUSEDAMP_FN uint32_t bin_of_half(float x) {
  const uint32_t exponent = bits_of(x) << 1 >> 24, above = (exponent > 85u ? exponent : 85u) - 85u;
  return above < 63u ? above : 63u;
}
FUSEDAMP_FN uint32_t bin_of(double x) { return static_cast<uint32_t>(Double::bin(bits_of(x))); }

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
