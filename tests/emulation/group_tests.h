// Steps of many groups and rules in one call: their launches and uploads.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "step_tests.h"

namespace world {

inline void test_rules_in_turn(Random& random, bool skipped) {
  Step step;
  const RuleId rules[] = {kAdamW, kSgd, kSgd, kLamb, kAdamW, kLion, kLion, kSgdMomentum};
  for (const RuleId rule : rules) {
    step.add(random, rule, {}, Alignment::kRandom);  // without rows
    step.add(random, rule, {5, 0, cuda::kChunk + 3, 130}, Alignment::kRandom);
  }
  step.add(random, kLamb, {}, Alignment::kRandom);
  run_both(random, step, skipped, skipped ? Telling::kNot : Telling::kDue);
}

// A device that caches uploads by content, as the ops do.
class KeepingDevice {
 public:
  explicit KeepingDevice(int multiprocessors) : device_(*EmulatedDevice(multiprocessors)) {
    device_.scratch = [this](int64_t bytes) { return keep(bytes); };
    device_.resident = [this](const void* table, int64_t bytes) -> const void* {
      const std::string content(static_cast<const char*>(table), static_cast<size_t>(bytes));
      const auto [known, is_new] = sent_.try_emplace(content, nullptr);
      if (is_new) {
        known->second = keep(bytes);
        cuda::upload(nullptr, known->second, table, bytes);
        sent_bytes += bytes;
      }
      return known->second;
    };
  }
  const cuda::Device& operator*() const { return device_; }

  int64_t sent_bytes = 0;

 private:
  void* keep(int64_t bytes) {
    kept_.push_back(allocate(bytes, 0xff));
    return kept_.back().get();
  }
  cuda::Device device_;
  std::map<std::string, void*> sent_;
  std::vector<Memory> kept_;
};

inline std::string launch_names() {
  const char* const* names = nullptr;
  std::string text;
  const unsigned count = emulation::launches(&names);
  for (unsigned i = 0; i < count; ++i) text += (i ? " " : "") + std::string(names[i]);
  emulation::forget_launches();
  return text;
}
inline void expect_launches(const std::string& wanted) {
  const std::string got = launch_names();
  expect(got == wanted, "launched %s; wanted %s", got.c_str(), wanted.c_str());
}

// FP32 tensors in groups.
inline Step plain_step(Random& random, RuleId rule, int groups, int tensors) {
  Step step;
  for (int g = 0; g < groups; ++g) {
    step.mixes_of = rule;
    step.mixes = {{DType::f32, DType::f32, DType::f64, DType::f32}};
    step.add(random, rule, std::vector<int64_t>(static_cast<size_t>(tensors), 77), Alignment::kAll);
  }
  return step;
}

struct Tables {
  std::vector<StepRow> rows;
  std::vector<void*> grads;
  explicit Tables(const Step& step) : rows(step.rows(&Twins::cuda)), grads(step.grads(&Twins::cuda)) {}
  StepTable table() const { return {rows.data(), grads.data(), static_cast<int64_t>(rows.size())}; }
};
inline StepGroups groups_of(const Step& step) { return {step.groups.data(), static_cast<int64_t>(step.groups.size())}; }

// A full step: gradient check, step with its log, scale update.
inline void run_phase(const cuda::Device& device, const Step& step, const Tables& tables, Log& log) {
  std::vector<GradRow> grads;
  for (size_t i = 0; i < tables.grads.size(); ++i) grads.push_back({tables.grads[i], tables.rows[i].numel, DType::f32});
  float scale = 4.0f, inv_scale = 0.0f, clip_coef = 0.0f, found_inf = 0.0f, norm = 0.0f;
  int32_t growth_tracker = 0;
  GradCheck check = {};
  check.scale = &scale;
  check.norm_type = 2.0;
  check.max_norm = 1.0;
  check.inv_scale = &inv_scale;
  check.clip_coef = &clip_coef;
  check.found_inf = &found_inf;
  check.norm = &norm;
  check.counts = log.counts.data();
  cuda::check_grads(device, grads, check, nullptr, {});
  cuda::step(device, tables.table(), groups_of(step), {&inv_scale, &clip_coef, &found_inf}, log.pointers(), {});
  cuda::update_scale(device, {2.0, 0.5, 0.0, kInf, 2000, 1, false}, &scale, &growth_tracker, nullptr, &found_inf);
}

inline void test_launches(Random& random) {
  now_testing = "launches";
  for (const int groups : {1, 3, cuda::kPacketGroups}) {
    KeepingDevice device(2);
    // Alone, a group has more rows than a block has threads: one of them keeps the log.
    const Step step = plain_step(random, kAdamW, groups, groups == 1 ? cuda::kBlock + 5 : 2);
    const Tables tables(step);
    Log log(3 * static_cast<int64_t>(tables.rows.size()));
    run_phase(*device, step, tables, log);
    launch_names();
    run_phase(*device, step, tables, log);
    expect_launches("grad_stats combine prepare step update_scale");
    expect(log.steps == 8, "%ld steps", long(log.steps));
  }
  {  // more groups than a launch has in its parameters
    for (const RuleId rule : {kAdamW, kLamb}) {
      const Step step = plain_step(random, rule, 2 * cuda::kPacketGroups + 1, 1);
      const Tables tables(step);
      KeepingDevice kept(2);
      Log log(3);
      cuda::step(*kept, tables.table(), groups_of(step), {}, log.pointers(), {});
      launch_names();
      cuda::step(*kept, tables.table(), groups_of(step), {}, log.pointers(), {});
      expect_launches(rule == kLamb ? "prepare prepare prepare measure conclude conclude conclude step"
                                    : "prepare prepare prepare step");
      expect(log.steps == 8, "%ld steps", long(log.steps));
    }
  }
  for (const bool always : {true, false}) {  // beside each step kernel, the one that tallies
    const Step step = plain_step(random, kAdamW, 1, 2);
    const Tables tables(step);
    double updates[2 * kTallies];
    const int32_t due = 0;
    KeepingDevice device(2);
    cuda::step(*device, tables.table(), groups_of(step), {}, {}, {updates, always ? nullptr : &due});
    launch_names();
    cuda::step(*device, tables.table(), groups_of(step), {}, {}, {updates, always ? nullptr : &due});
    expect_launches(always ? "prepare tally sum_up" : "prepare step tally sum_up");
  }
  for (const float found_inf : {0.0f, 1.0f}) {  // nothing to step
    Log log(700);
    cuda::step(*EmulatedDevice(2), {nullptr, nullptr, 0}, {nullptr, 0}, {nullptr, nullptr, &found_inf}, log.pointers(),
               {});
    expect_launches("log");
    log.expect(found_inf != 0.0f);
    cuda::step(*EmulatedDevice(2), {nullptr, nullptr, 0}, {nullptr, 0}, {nullptr, nullptr, &found_inf}, {}, {});
    expect_launches("");
  }
}

// Uploads when inputs of a step change.
inline void test_resident_tables(Random& random) {
  now_testing = "resident tables";
  Step step = plain_step(random, kAdamW, 3, 4);
  Tables tables(step);
  KeepingDevice device(2);
  const auto sent = [&] {
    const int64_t before = device.sent_bytes;
    cuda::step(*device, tables.table(), groups_of(step), {}, {}, {});
    return device.sent_bytes - before;
  };
  const int64_t column = 12 * 8;
  const int64_t first = sent();
  expect(first == column + 12 * static_cast<int64_t>(sizeof(cuda::Placed<StepRow>)), "%ld bytes at first", long(first));
  expect(sent() == 0, "a repeated step");
  step.groups[1].lr = 0.5;
  step.groups[2].hyper[0] = 0.5;
  expect(sent() == 0, "another learning rate");
  const Twins other(DType::f32, 77, 0);
  tables.grads[5] = other.cuda();
  expect(sent() == column, "a moved gradient");
  tables.rows[7].seed += 1;
  expect(sent() == first - column, "another row");
}

}  // namespace world
