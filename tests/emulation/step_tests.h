// Steps of random tensors in groups, on both engines.
#pragma once
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/engine/cpu/engine.h"
#include "step_tensors.h"

namespace world {

inline void choose(bool, AdamHyper& h) { h = {0.9, 0.999, 1e-8, 0.01}; }
inline void choose(bool flag, SgdHyper& h) { h = {0.9, 0.1, 0.01, double(flag)}; }
inline void choose(bool, LionHyper& h) { h = {0.9, 0.99, 0.01}; }
inline void choose(bool, AdagradHyper& h) { h = {0.01, 1e-10, 0.01}; }
inline void choose(bool, RmsPropHyper& h) { h = {0.99, 1e-8, 0.01, 0.9}; }
inline void choose(bool flag, NAdamHyper& h) { h = {0.9, 0.999, 1e-8, 0.01, double(flag), 0.9998}; }
inline void choose(bool flag, LambHyper& h) { h = {0.9, 0.999, 1e-6, 0.01, double(flag), flag ? kInf : 0.5, 1.0}; }
inline void choose(bool flag, LarsHyper& h) { h = {0.9, 0.01, 1e-3, 1e-8, double(flag), 1.0}; }
inline void choose(bool flag, NovoGradHyper& h) { h = {0.95, 0.98, 1e-8, 0.01, double(flag)}; }
inline void choose(bool flag, RAdamHyper& h) { h = {0.9, 0.999, 1e-8, 0.01, double(flag)}; }

inline void set_hyper(RuleId rule, bool flag, double* hyper) {
#define FUSEDAMP_RULE(op, Rule)                 \
  if (rule == k##Rule) {                        \
    Rule::Hyper chosen;                         \
    choose(flag, chosen);                       \
    std::memcpy(hyper, &chosen, sizeof chosen); \
  }
#include "../../csrc/math/optimizers.def"
}

struct Shape {
  int scalars, norms;
};

inline Shape shape_of(RuleId rule) {
  const Shape shapes[] = {
#define FUSEDAMP_RULE(op, Rule) {Rule::kScalars, Rule::kNorms},
#include "../../csrc/math/optimizers.def"
  };
  return shapes[rule];
}

// The inputs of a step except its scalars: consecutive groups of any rules.
struct Step {
  std::vector<StepTensor> tensors;
  std::vector<StepRow> flags;                             // of each tensor: what its row has besides its buffers
  mutable std::vector<double> cpu_squares, cuda_squares;  // norms over all ranks, if they are measured before the step
  std::vector<StepGroup> groups;
  int mixes_of = -1;
  std::vector<Mix> mixes;

  // Of a whole tensor or of a shard: rows, columns, with and without whole pairs, across a key's last element.
  static Placement any_place(Random& random) {
    const int64_t firsts[] = {0, 4096, 4097, kKeyElements - 200, 5 * kKeyElements + 3},
                  first = firsts[below(random, 5)];
    if (below(random, 3) > 0) return {below(random, 2) ? first : 0, 0, 0};
    const int64_t run = 1 + below(random, below(random, 2) ? 300 : 9) * (below(random, 2) ? 4 : 1);
    return {first, run, run + below(random, 9)};
  }

  // A group with tensors of these sizes.
  void add(Random& random, RuleId rule, const std::vector<int64_t>& sizes, Alignment alignment) {
    static const float single_lr = 3e-3f;
    static const double double_lr = 3e-3;
    StepGroup group = {};
    set_hyper(rule, below(random, 2) == 1, group.hyper);
    group.lr = 1e-3 * double(1 + below(random, 4));
    const int64_t lr = below(random, 3);
    group.lr_tensor = lr == 0 ? nullptr : lr == 1 ? static_cast<const void*>(&single_lr) : &double_lr;
    group.lr_dtype = lr == 1 ? DType::f32 : DType::f64;
    group.first = static_cast<int64_t>(tensors.size());
    group.count = static_cast<int64_t>(sizes.size());
    group.rule = rule;
    StepRow row = {};
    row.group = static_cast<int32_t>(groups.size());
    row.maximize = below(random, 2);
    row.stochastic = below(random, 2);
    groups.push_back(group);
    if (mixes_of != rule) {  // groups of one rule share the iteration, so that all mixes occur
      mixes_of = rule;
      mixes = every_mix(states_of(rule));
      std::shuffle(mixes.begin(), mixes.end(), random);
    }
    for (const int64_t numel : sizes) {
      const Mix mix = mixes[tensors.size() % mixes.size()];
      row.place = any_place(random);
      flags.push_back(row);
      tensors.push_back(step_tensor(random, numel, states_of(rule), mix, alignment));
      for (int s = 0; s < shape_of(rule).scalars; ++s) {
        tensors.back().states.emplace_back(DType::f64, 1, 0);
        tensors.back().states.back().set(0, double(below(random, 1000)) / 1001.0);
      }
    }
  }

  std::vector<StepRow> rows(Side side) const {
    std::vector<StepRow> rows;
    for (size_t i = 0; i < tensors.size(); ++i) {
      rows.push_back(row_of(tensors[i], side));
      rows.back().group = flags[i].group;
      rows.back().maximize = flags[i].maximize;
      rows.back().stochastic = flags[i].stochastic;
      rows.back().place = flags[i].place;
      std::vector<double>& squares = side == &Twins::cpu ? cpu_squares : cuda_squares;
      if (!squares.empty()) rows.back().squares = squares.data() + kMaxNorms * i;
    }
    return rows;
  }
  std::vector<void*> grads(Side side) const {
    std::vector<void*> grads;
    for (const StepTensor& t : tensors) grads.push_back((t.grad.*side)());
    return grads;
  }

  // The tensor is what is tested now. Returns whether its rule has norms.
  bool test_now(size_t i) const {
    const StepTensor& t = tensors[i];
    const int32_t rule = groups[static_cast<size_t>(flags[i].group)].rule;
    now_testing = std::string("step, rule ") + std::to_string(rule) + ", group " + std::to_string(flags[i].group) +
                  ", " + kDTypeNames[int(t.grad.dtype())] + " gradient, " + kDTypeNames[int(t.param.dtype())] +
                  " param" +
                  (t.master.empty() ? "" : std::string(" with ") + kDTypeNames[int(t.master[0].dtype())] + " master") +
                  ", states " + kDTypeNames[int(t.state_dtype)] + (flags[i].stochastic ? ", stochastic" : "");
    return shape_of(static_cast<RuleId>(rule)).norms > 0;
  }

  // Buffers that differ between the two engines.
  void expect_equal() const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const StepTensor& t = tensors[i];
      const bool has_norms = test_now(i);
      t.grad.expect_equal("grads", i);
      t.step.expect_equal("steps", i);
      // Norms are summed in another order; results are equal after rounding to FP32.
      const double doubles_off = has_norms ? 1e-11 : 0.0;
      t.param.expect_equal("params", i, doubles_off);
      for (const Twins& master : t.master) master.expect_equal("masters", i);
      for (const Twins& state : t.states) state.expect_equal("states", i, doubles_off);
      for (const Twins& scale : t.scales) scale.expect_equal("scales", i);
    }
  }
};

// A separate log for one engine.
struct Log {
  std::vector<int64_t> counts, last_counts;
  int64_t last_step = -1, steps = 6;
  explicit Log(int64_t words) : counts(words), last_counts(words, -1) {
    for (int64_t w = 0; w < words; ++w) counts[w] = 3 * w;
  }
  StepLog pointers() {
    return {&steps, counts.data(), last_counts.data(), &last_step, static_cast<int64_t>(counts.size())};
  }
  void expect(bool skipped) const {
    world::expect(steps == 7 && last_step == (skipped ? 7 : -1), "log: %ld steps, the last skipped one %ld",
                  long(steps), long(last_step));
    for (size_t w = 0; w < counts.size(); ++w)
      world::expect(last_counts[w] == (skipped ? counts[w] : -1), "log: count %zu is %ld", w, long(last_counts[w]));
  }
};

// Whether a step is tallied: not at all; always; or as a tensor says, which is 0 or not.
enum class Telling { kNot, kAlways, kNotDue, kDue };

// The updates of both engines: counts are equal, and sums but for the roundings of as many additions as there are
// elements. Untouched numbers are -7.
inline void expect_updates(const Step& step, const Twins& updates, bool written) {
  for (size_t i = 0; i < step.tensors.size(); ++i) {
    const bool has_norms = step.test_now(i);
    const auto numel = static_cast<double>(step.tensors[i].param.numel());
    for (int j = 0; j < kTallies; ++j) {
      const auto at = static_cast<int64_t>(i) * kTallies + j;
      const double a = get(updates.cpu(), DType::f64, at), b = get(updates.cuda(), DType::f64, at);
      const bool is_count = j < 2, counts = a >= 0.0 && a <= numel;
      const double off = is_count ? 0.0 : (2.0 * numel * 0x1p-53 + (has_norms ? 1e-9 : 0.0)) * std::fabs(a);
      const bool same = a == b || (!is_count && ((a != a && b != b) || std::fabs(a - b) <= off));
      expect(same && (!written || !is_count || counts) && (written || a == -7.0),
             "updates[%zu][%d]: CPU %.17g, CUDA %.17g", i, j, a, b);
    }
  }
  updates.expect_equal("updates", 0, kInf);  // and nothing before them is
}

// Measures on both engines; their step then takes the sums as if other ranks had added theirs.
inline void measure_both(Random& random, const Step& step, const StepGroups& groups, const StepScalars& scalars,
                         bool skipped) {
  const size_t words = kMaxNorms * step.tensors.size();
  step.cpu_squares.assign(words, 0.0);
  step.cuda_squares.assign(words, 0.0);
  const std::vector<StepRow> on_cpu = step.rows(&Twins::cpu), on_cuda = step.rows(&Twins::cuda);
  const std::vector<void*> cpu_grads = step.grads(&Twins::cpu), cuda_grads = step.grads(&Twins::cuda);
  const auto n = static_cast<int64_t>(on_cpu.size());
  cpu::measure({on_cpu.data(), cpu_grads.data(), n}, groups, scalars, one_thread);
  cuda::measure(*EmulatedDevice(static_cast<int>(below(random, 4))), {on_cuda.data(), cuda_grads.data(), n}, groups,
                scalars);
  for (size_t w = 0; w < words; ++w) {
    const int32_t rule = groups.groups[on_cpu[w / kMaxNorms].group].rule;
    const bool measured = !skipped && static_cast<int>(w % kMaxNorms) < shape_of(static_cast<RuleId>(rule)).norms;
    const double a = step.cpu_squares[w], b = step.cuda_squares[w];
    expect(measured || (a == 0.0 && b == 0.0), "squares %zu of rule %d: %g and %g", w, int(rule), a, b);
    expect(!measured || a == b || (a != a && b != b) || std::fabs(a - b) <= 1e-11 * a, "squares %zu: %.17g and %.17g",
           w, a, b);
    step.cpu_squares[w] = step.cuda_squares[w] = a == a ? (w % kMaxNorms == 0 ? 3.0 : 5.0) * a : a;
  }
}

// The same step on both engines.
inline void run_both(Random& random, const Step& step, bool skipped, Telling telling) {
  const float inv_scale = 1.0f / 1024.0f, clip_coef = 0.37f;
  const float bad[] = {1.0f, 2.0f, std::numeric_limits<float>::quiet_NaN()};
  const float found_inf = skipped ? bad[below(random, 3)] : below(random, 2) ? 0.0f : -0.0f;
  StepScalars scalars = {};
  if (below(random, 4)) scalars.inv_scale = &inv_scale;
  if (below(random, 2)) scalars.clip_coef = &clip_coef;
  if (skipped || below(random, 4)) scalars.found_inf = &found_inf;
  Log on_cpu(below(random, 3000)), on_cuda(static_cast<int64_t>(on_cpu.counts.size()));
  const bool logs = below(random, 2);
  const StepGroups groups = {step.groups.data(), static_cast<int64_t>(step.groups.size())};
  Twins updates(DType::f64, kTallies * static_cast<int64_t>(step.tensors.size()), below(random, 4));
  for (int64_t i = 0; i < updates.numel(); ++i) updates.set(i, -7.0);
  const int32_t due = telling == Telling::kDue ? int32_t(below(random, 2) ? 1 : -5) : 0;
  const auto tally_on = [&](Side side) {
    if (telling == Telling::kNot) return Tally{};
    return Tally{static_cast<double*>((updates.*side)()), telling == Telling::kAlways ? nullptr : &due};
  };
  if (below(random, 3) == 0) measure_both(random, step, groups, scalars, skipped);
  for (const bool cuda_too : {false, true}) {
    const Side side = cuda_too ? &Twins::cuda : &Twins::cpu;
    const std::vector<StepRow> rows = step.rows(side);
    const std::vector<void*> grads = step.grads(side);
    const StepTable table = {rows.data(), grads.data(), static_cast<int64_t>(rows.size())};
    if (!cuda_too) {
      cpu::step(table, groups, scalars, logs ? on_cpu.pointers() : StepLog{}, tally_on(side), one_thread);
    } else {
      cuda::step(*EmulatedDevice(static_cast<int>(below(random, 4))), table, groups, scalars,
                 logs ? on_cuda.pointers() : StepLog{}, tally_on(side));
    }
  }
  step.expect_equal();
  expect_updates(step, updates, !skipped && (telling == Telling::kAlways || telling == Telling::kDue));
  now_testing = "log of steps";
  if (logs) on_cpu.expect(skipped);
  if (logs) on_cuda.expect(skipped);
}

// Tensors of these sizes, distributed over a number of groups.
inline void test_step(Random& random, RuleId rule, const std::vector<int64_t>& sizes, Alignment alignment, bool skipped,
                      Telling telling = Telling::kNot) {
  Step step;
  const auto count = static_cast<int64_t>(sizes.size());
  const int64_t wanted[] = {1, 1, 3, 40}, groups = std::min(count, wanted[below(random, 4)]);
  for (int64_t g = 0; g < groups; ++g) {
    const auto begin = sizes.begin() + g * count / groups, end = sizes.begin() + (g + 1) * count / groups;
    step.add(random, rule, {begin, end}, alignment);
  }
  run_both(random, step, skipped, telling);
}

}  // namespace world
