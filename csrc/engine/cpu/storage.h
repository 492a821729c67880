// Reads and writes weights and states for a step, a block at a time: in place if they are stored in the arithmetic
// type, else through the L1 cache. `at` is the block's first element, a multiple of kBlock; n its length.
// Functions with branches on formats are not inlined: they would be compiled dozens of times, and the call is cheap per
// block.
#pragma once
#include "../../math/follow.h"
#include "../../math/quantize.h"
#include "../table.h"
#include "convert.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

static_assert(kBlock % kScaleBlock == 0, "a block consists of whole scale blocks");

// master[i] = tried[i] if that rounds to the weight, else the weight. `tried` may be `master`.
FUSEDAMP_FN void take_fitting(DType dtype, const uint16_t* param, const float* tried, float* master, int64_t n) {
  alignas(64) uint16_t rounded[kBlock];
  alignas(64) float weight[kBlock];
  narrow(dtype, tried, rounded, n);
  widen(dtype, param, weight, n);
  for (int64_t i = 0; i < n; ++i) master[i] = rounded[i] == param[i] ? tried[i] : weight[i];
}

// If a 16-bit weight differs from its rounded master, it was modified, and the master is updated (math/follow.h).
FUSEDAMP_FN void follow(DType dtype, const uint16_t* param, float* master, int64_t n) {
  if (!narrows_otherwise(dtype, master, param, n)) return;
  alignas(64) uint16_t rounded[kBlock];
  alignas(64) float moved[kBlock];
  narrow(dtype, master, rounded, n);
  if (dtype == DType::bf16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) moved[i] = bf16_moved(master[i], rounded[i], param[i]);
  } else {
    alignas(64) float was[kBlock], weight[kBlock];
    widen_f16(rounded, was, n);
    widen_f16(param, weight, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) moved[i] = f16_moved(master[i], was[i], weight[i]);
  }
  for (int64_t i = 0; i < n; ++i) moved[i] = rounded[i] != param[i] ? moved[i] : master[i];
  take_fitting(dtype, param, moved, master, n);
}

FUSEDAMP_FN void join(DType dtype, const uint16_t* param, const int16_t* remainder, float* master, int64_t n) {
  if (dtype == DType::bf16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) master[i] = bf16_joined(param[i], remainder[i]);
    return;
  }
  alignas(64) float wide[kBlock];
  widen_f16(param, wide, n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) master[i] = f16_joined(wide[i], remainder[i]);
  if (narrows_otherwise(dtype, master, param, n)) take_fitting(dtype, param, master, master, n);
}

FUSEDAMP_FN void split(DType dtype, const float* master, uint16_t* param, int16_t* remainder, int64_t n) {
  if (dtype == DType::bf16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      param[i] = float_to_bf16_away(master[i]);
      remainder[i] = bf16_remainder(master[i]);
    }
    return;
  }
  alignas(64) float wide[kBlock];
  narrow_f16(master, param, n);
  widen_f16(param, wide, n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) remainder[i] = f16_remainder(master[i], wide[i]);
}

// 16 random bits per element of a block, in the order of its pairs' words.
static __attribute__((noinline)) void draw(RandomKey key, int64_t first, int64_t n, uint16_t* halves) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lower half of a word comes first");
  const auto pair = static_cast<uint32_t>(first / 2), pairs = static_cast<uint32_t>(n + 1) / 2;
#pragma omp simd
  for (uint32_t i = 0; i < pairs; ++i) {
    const uint32_t bits = random_bits(key, pair + i);
    __builtin_memcpy(halves + 2 * i, &bits, sizeof bits);
  }
}

// The same for elements first .. first + n - 1 of a whole tensor, wherever they start. `halves` has room for n + 1.
static __attribute__((noinline)) void draw_run(uint64_t stream, int list, int64_t first, int64_t n, uint16_t* halves) {
  while (n > 0) {
    const RandomKey key = random_key(stream, list, first);
    const int64_t left = kKeyElements - first % kKeyElements, count = n < left ? n : left, odd = first % 2;
    if (odd) halves[0] = static_cast<uint16_t>(random_half(random_bits(key, static_cast<uint32_t>(first / 2)), 1));
    draw(key, first + odd, count - odd, halves + odd);
    first += count;
    halves += count;
    n -= count;
  }
}

// The same for elements at .. at + n - 1 of a buffer that is a part of a whole tensor.
static __attribute__((noinline)) void draw_part(const Placement& place, uint64_t stream, int list, int64_t at,
                                                int64_t n, uint16_t* halves) {
  while (n > 0) {
    const int64_t left = place.run == 0 ? n : place.run - at % place.run, count = n < left ? n : left;
    draw_run(stream, list, whole_index(place, at), count, halves);
    at += count;
    halves += count;
    n -= count;
  }
}

// Like narrow(), with stochastic rounding.
FUSEDAMP_FN void narrow(DType dtype, const float* from, uint16_t* to, int64_t n, const uint16_t* random) {
  if (dtype == DType::f16) return narrow_f16(from, to, n, random);
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits_of(from[i]), magnitude = u & 0x7fffffffu;
    largest = largest > magnitude ? largest : magnitude;
    to[i] = static_cast<uint16_t>((u + random[i]) >> 16);
  }
  if (largest < 0x7f7f0000u) return;  // the added bits cannot have reached infinity
  for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(from[i], random[i]);
}

template <bool kNonNegative, class C>
FUSEDAMP_FN void dequantize(const C* codes, const float* scales, float* to, int64_t n) {
  for (int64_t b = 0; b < n; b += kScaleBlock) {
    const float scale = *scales++;
    const int64_t end = b + kScaleBlock < n ? b + kScaleBlock : n;
#pragma omp simd
    for (int64_t i = b; i < end; ++i) to[i] = Codes<kNonNegative>::value(codes[i], scale);
  }
}

// `random` is null for rounding to nearest.
template <bool kNonNegative, class C>
FUSEDAMP_FN void quantize(const float* from, C* codes, float* scales, int64_t n, const uint16_t* random) {
  for (int64_t b = 0; b < n; b += kScaleBlock) {
    const int64_t end = b + kScaleBlock < n ? b + kScaleBlock : n;
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = b; i < end; ++i) {
      const uint32_t magnitude = bits_of(from[i]) & 0x7fffffffu;  // as integers, NaN > infinity > finite
      largest = largest > magnitude ? largest : magnitude;
    }
    const float scale = *scales++ = Codes<kNonNegative>::scale(largest);
    const float inverse = Codes<kNonNegative>::inverse(scale);
    if (!random) {
#pragma omp simd
      for (int64_t i = b; i < end; ++i)
        codes[i] = static_cast<C>(Codes<kNonNegative>::nearest(from[i], scale, inverse));
      continue;
    }
#pragma omp simd
    for (int64_t i = b; i < end; ++i) codes[i] = static_cast<C>(Codes<kNonNegative>::code(from[i], inverse, random[i]));
  }
}

// The value to step: the master if there is one, else the weight.
FUSEDAMP_FN double* load_weight(const StepRow& row, int64_t at, int64_t, double*) {
  return static_cast<double*>(row.param) + at;
}
static __attribute__((noinline)) float* load_weight(const StepRow& row, int64_t at, int64_t n, float* staging) {
  if (!is_16bit(row.param_dtype)) return static_cast<float*>(row.param) + at;
  const uint16_t* param = static_cast<const uint16_t*>(row.param) + at;
  if (row.master && row.master_dtype == DType::f32) {
    float* master = static_cast<float*>(row.master) + at;
    follow(row.param_dtype, param, master, n);
    return master;
  }
  if (row.master) {
    join(row.param_dtype, param, static_cast<const int16_t*>(row.master) + at, staging, n);
  } else {
    widen(row.param_dtype, param, staging, n);
  }
  return staging;
}

// After the step. `weight` is what load_weight returned. `random` is null for rounding to nearest.
FUSEDAMP_FN void store_weight(const StepRow&, int64_t, int64_t, const double*, const uint16_t*) {}
static __attribute__((noinline)) void store_weight(const StepRow& row, int64_t at, int64_t n, const float* weight,
                                                   const uint16_t* random) {
  if (!is_16bit(row.param_dtype)) return;
  uint16_t* param = static_cast<uint16_t*>(row.param) + at;
  if (row.master && row.master_dtype == DType::i16) {
    split(row.param_dtype, weight, param, static_cast<int16_t*>(row.master) + at, n);
  } else if (!random) {
    narrow(row.param_dtype, weight, param, n);
  } else {
    narrow(row.param_dtype, weight, param, n, random);
  }
}

template <bool kNonNegative>
FUSEDAMP_FN double* load_state(const StepRow& row, int j, int64_t at, int64_t, double*) {
  return static_cast<double*>(row.states[j]) + at;
}
template <bool kNonNegative>
static __attribute__((noinline)) float* load_state(const StepRow& row, int j, int64_t at, int64_t n, float* staging) {
  if (row.state_dtype == DType::f32) return static_cast<float*>(row.states[j]) + at;
  if (row.state_dtype == DType::bf16) {
    widen_bf16(static_cast<const uint16_t*>(row.states[j]) + at, staging, n);
  } else {
    using Code = CodeOf<kNonNegative>;
    dequantize<kNonNegative>(static_cast<const Code*>(row.states[j]) + at, row.scales[j] + at / kScaleBlock, staging,
                             n);
  }
  return staging;
}

// After the step. `state` is what load_state returned.
template <bool kNonNegative>
FUSEDAMP_FN void store_state(const StepRow&, int, int64_t, int64_t, const double*, const uint16_t*) {}
template <bool kNonNegative>
static __attribute__((noinline)) void store_state(const StepRow& row, int j, int64_t at, int64_t n, const float* state,
                                                  const uint16_t* random) {
  if (row.state_dtype == DType::f32) return;
  if (row.state_dtype == DType::bf16) {
    narrow(DType::bf16, state, static_cast<uint16_t*>(row.states[j]) + at, n, random);
  } else {
    using Code = CodeOf<kNonNegative>;
    quantize<kNonNegative>(state, static_cast<Code*>(row.states[j]) + at, row.scales[j] + at / kScaleBlock, n, random);
  }
}

// Calls visit(j, constant) for each state; the constant is true if the state is never negative.
template <bool kYes>
struct NonNegative {
  static constexpr bool value = kYes;
};
template <class Rule, class Visit>
FUSEDAMP_FN void for_each_state(Visit visit) {
  constexpr int kMask = Rule::kNonNegative;
  if constexpr (Rule::kStates > 0) visit(0, NonNegative<(kMask & 1) != 0>());
  if constexpr (Rule::kStates > 1) visit(1, NonNegative<(kMask & 2) != 0>());
  if constexpr (Rule::kStates > 2) visit(2, NonNegative<(kMask & 4) != 0>());
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
