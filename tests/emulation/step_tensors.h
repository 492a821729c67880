// Random tensors of a step in every storage format.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "../../csrc/engine/cuda/platform.cuh"
#include "../../csrc/math/quantize.h"
#include "../../csrc/math/rules.h"
#include "world.h"

namespace world {

using namespace fusedamp;

constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
inline const char* const kDTypeNames[] = {"fp16", "bf16", "fp32", "fp64", "int8", "uint8", "int16"};

inline void one_thread(int64_t units, const std::function<void(int64_t)>& run) {
  for (int64_t u = 0; u < units; ++u) run(u);
}

inline std::vector<int64_t> random_sizes(Random& random, int64_t largest) {
  std::vector<int64_t> sizes = {0, 1, 3, 7, cuda::kChunk, cuda::kChunk + 1, 2 * cuda::kChunk - 1, 0};
  for (int64_t power = 2; power + 1 <= largest; power *= 2)
    for (int64_t d = -1; d <= 1; ++d) sizes.push_back(power + d);
  for (int i = 0; i < 40; ++i) sizes.push_back(below(random, 300));
  sizes.push_back(largest);
  std::shuffle(sizes.begin(), sizes.end(), random);
  if (below(random, 2)) sizes.push_back(0);
  return sizes;
}

enum class Alignment { kAll, kShared, kRandom };  // 16 bytes; the same element offset in every list; any

// Element offsets of the lists of one tensor.
struct Offsets {
  Alignment alignment;
  int64_t shared;
  Random& random;
  Offsets(Alignment a, Random& r) : alignment(a), shared(below(r, 8)), random(r) {}
  int64_t next() const {
    if (alignment == Alignment::kAll) return 0;
    return alignment == Alignment::kShared || below(random, 3) ? shared : below(random, 8);
  }
};

struct StepTensor {
  Twins grad, param, step;
  int64_t seed;
  DType state_dtype;
  std::vector<Twins> master, states, scales;
};

struct RuleStates {
  int count, never_negative;
};
inline RuleStates states_of(RuleId rule) {
  const RuleStates rules[] = {
#define FUSEDAMP_RULE(op, Rule) {Rule::kStates, Rule::kNonNegative},
#include "../../csrc/math/optimizers.def"
  };
  return rules[rule];
}

// Quantized values and scales that a step can produce, and some that it cannot: a scale of 0 or NaN with any quantized
// value.
inline void add_codes(StepTensor& t, Random& random, int64_t numel, bool never_negative, int64_t offset) {
  t.states.emplace_back(never_negative ? DType::u8 : DType::i8, numel, offset);
  for (int64_t i = 0; i < numel; ++i)
    t.states.back().set(i, double(never_negative ? 1 + below(random, 255) : below(random, 255) - 127));
  const int64_t blocks = (numel + kScaleBlock - 1) / kScaleBlock;
  t.scales.emplace_back(DType::f32, blocks, 0);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t kind = below(random, 60);
    t.scales.back().set(b, kind == 0 ? 0.0 : kind == 1 ? kNaN : std::ldexp(1.0, -static_cast<int>(below(random, 30))));
  }
}

// Storage formats of a tensor's lists; `master` is f64 if there is none.
struct Mix {
  DType grad, param, master, state;
};
inline std::vector<Mix> every_mix(RuleStates rule) {
  constexpr DType kNone = DType::f64;
  std::vector<Mix> mixes;
  for (const DType grad : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    mixes.push_back({grad, DType::f64, kNone, DType::f64});
    if (grad == DType::f64) continue;
    for (const DType state : {DType::f32, DType::bf16, DType::i8}) {
      if (state != DType::f32 && rule.count == 0) continue;
      mixes.push_back({grad, DType::f32, kNone, state});
      for (const DType param : {DType::f16, DType::bf16})
        for (const DType master : {kNone, DType::f32, DType::i16}) mixes.push_back({grad, param, master, state});
    }
  }
  return mixes;
}

inline StepTensor step_tensor(Random& random, int64_t numel, RuleStates rule, Mix mix, Alignment alignment) {
  const DType grad_dtype = mix.grad, param_dtype = mix.param, state_dtype = mix.state;
  const Offsets offsets(alignment, random);
  StepTensor t = {{grad_dtype, numel, offsets.next()},
                  {param_dtype, numel, offsets.next()},
                  {DType::f32, 1, 0},
                  static_cast<int64_t>(random()),
                  state_dtype,
                  {},
                  {},
                  {}};
  t.grad.fill(random, 50.0);
  t.param.fill(random, 1.0);
  const double late[] = {0x1p24 - 1, 0x1p24, 0x1p24 + 2, 0x1p62, 1e30, kNaN, -3.0};  // the last ones: never undefined
  t.step.set(0, below(random, 3) ? 4.0 : below(random, 8) ? double(below(random, 2000)) : late[below(random, 7)]);
  if (mix.master == DType::f32) {
    t.master.emplace_back(DType::f32, numel, offsets.next());
    for (int64_t i = 0; i < numel; ++i) {
      const float master = static_cast<float>(normal(random, 1.0));
      t.master[0].set(i, master);
      t.param.set(i, master);
      if (below(random, 50)) continue;  // else the weight was modified: somewhat, or to anything
      const double anything[] = {0.0, -0.0, kInf, kNaN, 1e-7, normal(random, 1.0), normal(random, 1e-4), 1e4};
      t.param.set(i, below(random, 2) ? master * 1.25 : anything[below(random, 8)]);
    }
  } else if (mix.master == DType::i16) {
    t.master.emplace_back(DType::i16, numel, offsets.next());
    for (int64_t i = 0; i < numel; ++i) {
      t.master[0].set(i, double(below(random, 65536) - 32768));
      if (below(random, 50) == 0) t.param.set(i, below(random, 2) ? 0.0 : kInf);  // written
    }
  }
  for (int s = 0; s < rule.count; ++s) {
    const bool never_negative = rule.never_negative >> s & 1;
    if (state_dtype == DType::i8) {
      add_codes(t, random, numel, never_negative, offsets.next());
      continue;
    }
    t.states.emplace_back(state_dtype, numel, offsets.next());
    for (int64_t i = 0; i < numel; ++i)
      t.states[s].set(i, never_negative ? std::fabs(normal(random, 0.01)) : normal(random, 0.1));
  }
  if (numel > 0 && below(random, 4) == 0) {
    const double specials[] = {kInf, -kInf, kNaN, 0.0, -0.0, 1e-38, 65504.0};
    for (const double x : specials) t.grad.set(below(random, numel), x);
    t.param.set(below(random, numel), kNaN);
    t.param.set(numel - 1, kInf);
  }
  return t;
}

using Side = void* (Twins::*)() const;

inline StepRow row_of(const StepTensor& t, Side side) {
  StepRow row = {};
  row.param = (t.param.*side)();
  row.master = t.master.empty() ? nullptr : (t.master[0].*side)();
  row.master_dtype = t.master.empty() ? DType::f32 : t.master[0].dtype();
  for (size_t s = 0; s < t.states.size(); ++s) row.states[s] = (t.states[s].*side)();
  for (size_t s = 0; s < t.scales.size(); ++s) row.scales[s] = static_cast<float*>((t.scales[s].*side)());
  row.state_dtype = t.state_dtype;
  row.seed = t.seed;
  row.step = static_cast<float*>((t.step.*side)());
  row.numel = t.param.numel();
  row.grad_dtype = t.grad.dtype();
  row.param_dtype = t.param.dtype();
  return row;
}

}  // namespace world
