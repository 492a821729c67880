// Every FP32 value through the split masters of csrc/math/split.h, and the stochastic roundings of rounding.h over all
// of their random bits; and every value through the vectors that the CPU's engine rounds by. usage: rounding_exhaustive
// [first of 2^32] [end]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../../csrc/engine/cpu/storage.h"
#include "../../csrc/math/absorb.h"

using namespace fusedamp;

static long failures = 0;

static void expect(bool good, const char* what, uint32_t bits) {
  if (good || ++failures > 10) return;
  printf("FAIL %s: %08x (%g)\n", what, bits, double(float_of(bits)));
}

static bool same(float a, float b) { return bits_of(a) == bits_of(b); }

// Without branches, so that compilers vectorize them over all 2^32.
static inline bool good_bf16(uint32_t bits) {
  const float x = float_of(bits);
  const uint16_t weight = float_to_bf16_away(x);
  const float back = bf16_joined(weight, bf16_remainder(x)), wide = bf16_to_float(weight);
  const uint32_t magnitude = bits & 0x7fffffffu, below = magnitude & 0xffff0000u;  // half way is 0x8000, and goes away
  const uint32_t wanted = (magnitude - below < 0x8000u ? below : below + 0x10000u) | (bits & 0x80000000u);
  const bool nan = (back != back) & (wide != wide), exact = (bits_of(back) == bits) & (bits_of(wide) == wanted);
  return magnitude > 0x7f800000u ? nan : exact;
}

static inline bool good_f16(uint32_t bits) {
  const float x = float_of(bits), wide = f16_to_float(float_to_f16(x));
  const int16_t remainder = f16_remainder(x, wide);
  const float joined = f16_joined(wide, remainder);
  const bool fits = bits_of(f16_to_float(float_to_f16(joined))) == bits_of(wide);  // else it would count as written
  const float back = fits ? joined : wide;
  const uint32_t magnitude = bits & 0x7fffffffu, infinity = 0x7f800000u | (bits & 0x80000000u);
  const float off = x - back;  // exact where it is small
  const float most = (remainder == 16383) | (remainder == -16383) ? 0x1p-39f : 0x1p-40f;
  const bool nan = back != back, infinite = bits_of(back) == infinity, exact = bits_of(back) == bits;
  const bool near = (off <= most) & (off >= -most);
  return magnitude > 0x7f800000u ? nan : magnitude >= 0x477ff000u ? infinite : magnitude >= 0x37800000u ? exact : near;
}

// An update from the value's rounding, and from that one's neighbor, to the value: absorbed where it rounds back.
static inline bool good_absorption(uint32_t bits, uint32_t neighbor) {
  const float x = float_of(bits);
  const auto half = static_cast<uint16_t>(float_to_f16(x) + neighbor),
             brain = static_cast<uint16_t>(float_to_bf16(x) + neighbor);
  const float a = f16_to_float(half), b = bf16_to_float(brain), to_a = a + (x - a), to_b = b + (x - b);
  const bool of_half = (float_to_f16(to_a) == half) & (to_a == to_a);
  const bool of_brain = (float_to_bf16(to_b) == brain) & (to_b == to_b);
  return (f16_absorbs(a, x - a) == of_half) & (bf16_absorbs(b, x - b) == of_brain);
}

// How often a value is rounded away from zero, out of 2^16: its distance from the value below, exactly.
static void check_stochastic(uint32_t bits) {
  const float x = float_of(bits);
  if (!(std::fabs(x) < 65504.0f) || std::fabs(x) < 0x1p-24f) return;
  double mean_bf16 = 0.0, mean_f16 = 0.0;
  for (uint32_t r = 0; r < 65536; ++r) {
    mean_bf16 += bf16_to_float(float_to_bf16(x, r)) / 65536.0;
    mean_f16 += f16_to_float(float_to_f16(x, r)) / 65536.0;
  }
  expect(mean_bf16 == double(x), "BF16, mean", bits);
  // Subnormal halves see 16 bits below their last place.
  expect(std::fabs(mean_f16 - double(x)) <= (std::fabs(x) < 0x1p-14f ? 0x1p-40 : 0.0), "FP16, mean", bits);
}

static void check_never_by_chance() {
  for (const uint32_t random : {0u, 0x7fffu, 0xffffu}) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      expect(std::isfinite(bf16_to_float(float_to_bf16(float_of(0x7f7fffffu | sign), random))), "BF16, largest",
             random);
      expect(std::isfinite(f16_to_float(float_to_f16(float_of(0x477fffffu | sign), random))), "FP16, largest", random);
      expect(float_to_bf16(float_of(sign), random) == sign >> 16, "BF16, zero", random);
      expect(float_to_f16(float_of(sign), random) == sign >> 16, "FP16, zero", random);
      for (const uint32_t nan : {0x7f800001u, 0x7fffffffu, 0x7fc00000u}) {
        expect(std::isnan(bf16_to_float(float_to_bf16(float_of(nan | sign), random))), "BF16, NaN", nan);
        expect(std::isnan(f16_to_float(float_to_f16(float_of(nan | sign), random))), "FP16, NaN", nan);
      }
      const float infinity = float_of(0x7f800000u | sign);
      expect(same(bf16_to_float(float_to_bf16(infinity, random)), infinity), "BF16, infinity", random);
      expect(same(f16_to_float(float_to_f16(infinity, random)), infinity), "FP16, infinity", random);
    }
  }
}

// A remainder with a weight that it does not belong to.
static void check_written() {
  for (uint32_t weight = 0; weight < 65536; ++weight) {
    for (const int remainder : {-32768, -16384, -5, 0, 1, 16384, 32767}) {
      const auto w = static_cast<uint16_t>(weight);
      const float wide = bf16_to_float(w), master = bf16_joined(w, static_cast<int16_t>(remainder));
      expect(wide != wide ? master != master : float_to_bf16_away(master) == w, "BF16, written", weight);
    }
  }
}

// Vectors of one class of values, and (mixed) of all: if one element takes the exact path, so does its vector.
static void check_vectors(uint32_t first, bool mixed) {
  constexpr int n = 64;
  float from[n];
  uint16_t random[n], to[n];
  for (uint32_t i = 0; i < n; ++i) from[i] = float_of(first + i + (mixed ? i * i * 0x00345000u : 0u));
  draw(random_key(random_stream(first, 0), 0, 0), 0, first, n, random);
  for (const DType half : {DType::f16, DType::bf16}) {
    narrow(half, from, to, n - mixed, random);  // an odd end, too
    for (int i = 0; i < n - mixed; ++i) {
      const uint16_t wanted = half == DType::f16 ? float_to_f16(from[i], random[i]) : float_to_bf16(from[i], random[i]);
      expect(to[i] == wanted, half == DType::f16 ? "FP16, in a vector" : "BF16, in a vector", bits_of(from[i]));
    }
  }
}

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? strtoull(argv[1], nullptr, 0) : 0;
  const uint64_t end = argc > 2 ? strtoull(argv[2], nullptr, 0) : uint64_t{1} << 32;
  for (uint64_t at = first; at < end; at += 4096) {
    unsigned bad = 0;
#pragma omp simd reduction(+ : bad)
    for (uint32_t i = 0; i < 4096; ++i) bad += !good_bf16(static_cast<uint32_t>(at) + i);
#pragma omp simd reduction(+ : bad)
    for (uint32_t i = 0; i < 4096; ++i) bad += !good_f16(static_cast<uint32_t>(at) + i);
    expect(bad == 0, "split masters from", static_cast<uint32_t>(at));
    bad = 0;
#pragma omp simd reduction(+ : bad)
    for (uint32_t i = 0; i < 4096; ++i)
      bad += !good_absorption(static_cast<uint32_t>(at) + i, 0) + !good_absorption(static_cast<uint32_t>(at) + i, 1);
    expect(bad == 0, "absorbed updates from", static_cast<uint32_t>(at));
    for (uint32_t i = 0; i < 4096; i += 64) check_vectors(static_cast<uint32_t>(at) + i, false);
    check_vectors(static_cast<uint32_t>(at), true);
    check_vectors(static_cast<uint32_t>(at) ^ 0x80000000u, true);  // of the other half of all values, some
  }
  uint32_t bits = 12345;
  for (int i = 0; i < 60; ++i) check_stochastic(bits = bits * 1664525u + 1013904223u);
  for (uint32_t exponent = 103; exponent < 143; ++exponent)
    for (const uint32_t low : {0u, 1u, 0x1fffu, 0x7fffu, 0x8000u, 0x7fffffu}) check_stochastic(exponent << 23 | low);
  check_never_by_chance();
  check_written();
  printf("%ld failures\n", failures);
  return failures != 0;
}
