// FP16 and BF16 <-> FP32, to nearest with ties to even, safe for NaN, infinity and subnormals (IEEE 754-2019, 4.3.1),
// or stochastically: up with the probability that makes it unbiased (Gupta et al. 2015, arXiv:1502.02551, section 3.1).
// Portable bit arithmetic; the engines use hardware instructions with the same results where they exist.
#pragma once
#include "vocab.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

FUSEDAMP_FN uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
FUSEDAMP_FN float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

// Of 0 <= x < 2^31, without its fraction.
FUSEDAMP_FN uint32_t truncated(float x) { return static_cast<uint32_t>(static_cast<int32_t>(x)); }
// Of a word as a signed integer.
FUSEDAMP_FN float converted(uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }
FUSEDAMP_FN uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
// Of numbers, not NaN.
FUSEDAMP_FN float larger(float a, float b) { return a > b ? a : b; }
FUSEDAMP_FN float smaller(float a, float b) { return a < b ? a : b; }

// condition ? yes : no, without the branch that would keep a loop scalar.
FUSEDAMP_FN uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

FUSEDAMP_FN float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

FUSEDAMP_FN uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;  // rounding could turn a NaN into infinity or -0
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : nearest);
}

FUSEDAMP_FN float f16_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  const uint32_t normal = ((exponent + 112u) << 23) | (mantissa << 13);
  const uint32_t subnormal = bits_of(static_cast<float>(mantissa) * 5.9604644775390625e-8f);  // * 2^-24, exact
  const uint32_t special = 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u);
  return float_of(sign | (exponent == 0u ? subnormal : exponent == 31u ? special : normal));
}

FUSEDAMP_FN uint16_t float_to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u | ((a >> 13) & 0x1ffu);
  } else if (a >= 0x477ff000u) {  // 65520, the midpoint above the largest finite value
    h = 0x7c00u;
  } else if (a < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at 2^-24, FP16's last place
    h = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  } else {
    h = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return static_cast<uint16_t>(sign | h);
}

// Stochastic: `random` is 16 random bits. A finite value never becomes infinite.
FUSEDAMP_FN uint16_t float_to_bf16(float x, uint32_t random) {
  const uint32_t u = bits_of(x), up = u + random, magnitude = u & 0x7fffffffu;
  const bool is_nan = magnitude > 0x7f800000u;
  const bool overflows = magnitude >= 0x7f800000u || (up & 0x7fffffffu) >= 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : (overflows ? u : up) >> 16);
}

FUSEDAMP_FN uint16_t float_to_f16(float x, uint32_t random) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  // Below 2^-14 in units of 2^-40, 16 bits finer than FP16's last place.
  const uint32_t least = 0x38800000u, below = a < least ? a : least;
  const uint32_t fine = static_cast<uint32_t>(static_cast<int32_t>(float_of(below) * 1099511627776.0f));
  const uint32_t subnormal = (fine + random) >> 16;
  const uint32_t normal = (a + (random >> 3) - 0x38000000u) >> 13, largest = 0x7bffu;
  const uint32_t finite = select(a < least, subnormal, normal < largest ? normal : largest);
  const uint32_t h = select(a >= 0x47800000u, a > 0x7f800000u ? 0x7e00u : 0x7c00u, finite);  // from 65536 on
  return static_cast<uint16_t>(sign | h);
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
