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

// 16 random bits per element of a block that begins with a quad, for one list. Up to 3 more are written.
template <int kList>
static __attribute__((noinline)) void draw(RandomKey key, int64_t first, int64_t n, uint16_t* halves) {
  const auto quad = static_cast<uint32_t>(first / kQuad), quads = static_cast<uint32_t>((n + kQuad - 1) / kQuad);
  uint32_t i = 0;
#if defined(FUSEDAMP_WIDE)
  for (; i + kWide <= quads; i += kWide)
    write_rings(halves + kQuad * i, random_word(key, counted() + (quad + i)), kList == 1 ? 2 : 0);
#endif
  for (; i < quads; ++i) {
    const uint32_t word = random_word(key, quad + i);
    for (int e = 0; e < kQuad; ++e) halves[kQuad * i + e] = static_cast<uint16_t>(random_part(word, e, kList));
  }
}
FUSEDAMP_FN void draw(RandomKey key, int list, int64_t first, int64_t n, uint16_t* halves) {
  list == 1 ? draw<1>(key, first, n, halves) : draw<0>(key, first, n, halves);
}

// The same for elements first .. first + n - 1 of a whole tensor, wherever they start.
FUSEDAMP_FN void draw_run(uint64_t stream, int list, int64_t first, int64_t n, uint16_t* halves) {
  while (n > 0) {
    const RandomKey key = random_key(stream, list, first);
    const int64_t left = kKeyElements - first % kKeyElements, count = n < left ? n : left;
    const int64_t whole = first % kQuad == 0 ? 0 : kQuad - first % kQuad, begin = count < whole ? count : whole;
    for (int64_t i = 0; i < begin; ++i)
      halves[i] = static_cast<uint16_t>(random_part(random_word(key, static_cast<uint32_t>((first + i) / kQuad)),
                                                    static_cast<int>((first + i) % kQuad), list));
    draw(key, list, first + begin, count - begin, halves + begin);
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
FUSEDAMP_FN void dequantize(const C* __restrict codes, const float* scales, float* __restrict to, int64_t n) {
  const float scale = *scales;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    to[i] = Codes<kNonNegative>::template value<0>(static_cast<uint32_t>(codes[i]), scale);
}

// One scale block whose largest magnitude has the bits `largest`. `random` is null for rounding to nearest.
template <bool kNonNegative, class C>
FUSEDAMP_FN void quantize_block(const float* __restrict from, C* __restrict codes, float* scale_at, int64_t n,
                                const uint16_t* __restrict random, uint32_t largest) {
  using Code = Codes<kNonNegative>;
  const float scale = *scale_at = Code::scale(largest), inverse = Code::inverse(scale);
  if (largest >= Code::kBelow) {  // infinity and NaN, too
    for (int64_t i = 0; i < n; ++i)
      codes[i] =
          static_cast<C>(scale == scale ? Code::code(from[i], inverse, random ? random[i] : 0x8000u) : Code::kZero);
  } else if (!random) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<C>(Code::code_below(from[i], inverse, 0x8000u));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<C>(Code::code_below(from[i], inverse, uint32_t{random[i]}));
  }
}

template <bool kNonNegative, class C>
FUSEDAMP_FN void quantize(const float* from, C* codes, float* scales, int64_t n, const uint16_t* random) {
  static_assert(kBlock == kScaleBlock, "a block is a scale block");
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(from[i]) & 0x7fffffffu;  // as integers, NaN > infinity > finite
    largest = largest > magnitude ? largest : magnitude;
  }
  quantize_block<kNonNegative>(from, codes, scales, n, random, largest);
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
