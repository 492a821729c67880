// A loss scale that sees its headroom: it follows the largest gradients of the last 512 good steps, so that they stay
// `headroom_bits` below the largest number of FP16, and comes down before they overflow. Powers of two only. After an
// overflow it waits twice as long before it grows again. In integers, so every device and instruction set agrees.
#pragma once
#include "vocab.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// Exponents floor(log2 x) that are told apart: smaller and larger ones count as the first and the last.
constexpr int32_t kLeastExponent = -40, kExponents = 64;
constexpr int32_t kHeadroomWindow = 512, kHeadroomOutliers = 2, kHeadroomPatience = 64;
// The exponents of a scale: normal FP32 numbers, so that 1 / scale is finite.
constexpr int64_t kLeastScale = -126, kLargestScale = 127;

struct HeadroomRule {
  int64_t headroom_bits, growth_interval;
  int64_t least, largest;  // exponents of the scale: from kLeastScale to kLargestScale
};

// The op's state, all int32. All zeros: a new one.
struct HeadroomState {
  int32_t run;                    // overflows in a row, at most 3: from there on the scale falls by 4 bits each
  int32_t good;                   // good steps in a row
  int32_t wait;                   // good steps in a row in which the scale could have been larger
  int32_t patience;               // of these, how many until it grows by 1 bit; 0: kHeadroomPatience
  int32_t kept;                   // entries of the ring
  int32_t cursor;                 // where the ring is written next: the oldest entry, if it is full
  int32_t unused[2];              // 0
  int32_t counts[kExponents];     // how many entries of the ring have this value
  int32_t ring[kHeadroomWindow];  // for each of the last good steps: the exponent of its largest gradient, from 0 to 63
};
static_assert(sizeof(HeadroomState) == 584 * sizeof(int32_t), "the op's schema says int32 [584]");

// x = (1 + fraction / 2^52) * 2^exponent, for normal x > 0.
struct Binade {
  int64_t exponent;
  uint64_t fraction;
};
FUSEDAMP_FN Binade binade_of(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return {static_cast<int64_t>(bits >> 52) - 1023, bits & ((uint64_t{1} << 52) - 1)};
}

// The exponents of the powers of two from min_scale to max_scale; none if least > largest.
FUSEDAMP_FN HeadroomRule headroom_rule(int64_t headroom_bits, int64_t growth_interval, double min_scale,
                                       double max_scale) {
  const Binade low = binade_of(min_scale), high = binade_of(max_scale);
  const int64_t least = low.exponent + (low.fraction != 0);
  return {headroom_bits, growth_interval, where(least > kLeastScale, least, kLeastScale),
          where(high.exponent < kLargestScale, high.exponent, kLargestScale)};
}

FUSEDAMP_FN int64_t bounded(int64_t x, int64_t least, int64_t largest) {
  return x < least ? least : x > largest ? largest : x;
}

// Masks keep an access within the state even if something else wrote it.
FUSEDAMP_FN void push_exponent(HeadroomState& s, int64_t exponent) {
  int32_t& oldest = s.ring[s.cursor & (kHeadroomWindow - 1)];
  if (s.kept >= kHeadroomWindow)
    --s.counts[oldest & (kExponents - 1)];
  else
    ++s.kept;
  oldest = static_cast<int32_t>(bounded(exponent - kLeastExponent, 0, kExponents - 1));
  ++s.counts[oldest];
  s.cursor = (s.cursor + 1) & (kHeadroomWindow - 1);
}

// The largest exponent that more entries reach than are allowed as outliers.
FUSEDAMP_FN int64_t exponent_without_outliers(const HeadroomState& s) {
  const int32_t outliers = kHeadroomOutliers * s.kept / kHeadroomWindow;
  int32_t reached = 0, found = 0;
  for (int32_t i = 0; i < kExponents; ++i) {  // from below: no early exit, so that loads don't wait for each other
    reached += s.counts[i];
    if (s.kept - reached + s.counts[i] > outliers) found = i;
  }
  return kLeastExponent + found;
}

// The next scale. largest: the largest |gradient| of the step, times the scale; 0 or not finite: none is known.
FUSEDAMP_FN float next_headroom_scale(const HeadroomRule& rule, float scale, HeadroomState& s, bool overflow,
                                      double largest) {
  constexpr double kInf = __builtin_huge_val();
  const bool valid = scale > 0.0f && scale < kInf;
  const Binade now = binade_of(scale);
  // Where a user set no valid scale: infinity counts as the largest, all else as the least one.
  int64_t k = bounded(valid ? now.exponent : scale == kInf ? rule.largest : rule.least, rule.least, rule.largest);
  int64_t patience = s.patience ? s.patience : kHeadroomPatience;
  if (overflow) {
    const int64_t down = s.run >= 2 ? 4 : s.run + 1;  // 1, 2, 4, 4 ...
    k = bounded(k - down, rule.least, rule.largest);
    if (s.run == 0) patience = where(2 * patience < rule.growth_interval, 2 * patience, rule.growth_interval);
    if (s.run < 3) ++s.run;
    s.good = s.wait = 0;
  } else {
    s.run = 0;
    if (++s.good >= rule.growth_interval) {
      patience = where<int64_t>(patience / 2 > kHeadroomPatience, patience / 2, kHeadroomPatience);
      s.good = 0;
    }
    if (valid && largest > 0.0 && largest < kInf) {
      const Binade top = binade_of(largest);
      push_exponent(s, top.exponent - now.exponent - (top.fraction < now.fraction));
    }
    if (s.kept > 0) {
      const int64_t want = bounded(15 - exponent_without_outliers(s) - rule.headroom_bits, rule.least, rule.largest);
      const bool waits = k < want && ++s.wait < patience;
      if (!waits) {
        s.wait = 0;
        k = k < want ? k + 1 : want;
      }
    }
  }
  s.patience = static_cast<int32_t>(patience);
  uint32_t bits = static_cast<uint32_t>(k + 127) << 23;
  float next;
  __builtin_memcpy(&next, &bits, sizeof next);
  return next;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
