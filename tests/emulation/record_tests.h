// The rings of a watch, against the CPU engine: many steps, due or not, skipped or not.
#pragma once
#include <cstring>
#include <vector>

#include "../../csrc/engine/cpu/engine.h"
#include "../../csrc/engine/record.h"
#include "world.h"

namespace world {

struct Rings {
  std::vector<int64_t> clock, bins;
  std::vector<int32_t> due;
  std::vector<double> trajectory, steps, numbers;

  Rings(int64_t count, int64_t history, int64_t length)
      : clock{1, 0},
        bins(static_cast<size_t>(history * count * kBins), -7),
        due{0},
        trajectory(static_cast<size_t>(length * 4), -7.0),
        steps(static_cast<size_t>(history * 4), -7.0),
        numbers(static_cast<size_t>(history * count * kNumbers), -7.0) {}
  StepRecord into(StepRecord record) {
    record.clock = clock.data();
    record.due = due.data();
    record.steps = steps.data();
    record.numbers = numbers.data();
    record.bins = bins.data();
    record.trajectory = record.length > 0 ? trajectory.data() : nullptr;
    return record;
  }
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;  // null if there are none
}

inline void test_record(Random& random, int64_t count) {
  now_testing = "record of " + std::to_string(count) + " tensors";
  StepRecord record = {};
  record.every = 1 + below(random, 3);
  record.history = 1 + below(random, 4);
  record.length = below(random, 4) * 3;
  record.count = count;
  record.only_due = below(random, 2);
  Rings on_cpu(count, record.history, record.length), on_cuda = on_cpu;
  const auto n = static_cast<size_t>(count);
  std::vector<double> extremes(n * kExtremes), squares(n), updates(n * kTallies);
  std::vector<int64_t> histogram(n * kBins);
  on_cpu.due[0] = on_cuda.due[0] = record.every == 1;
  for (int64_t step = 1; step < 20; ++step) {
    for (auto* list : {&extremes, &squares, &updates})
      for (double& x : *list) x = below(random, 20) ? std::fabs(normal(random, 1e3)) : kInf;
    for (int64_t& x : histogram) x = static_cast<int64_t>(random());
    const float scale = 1024.0f, flags[] = {0.0f, 1.0f, std::numeric_limits<float>::quiet_NaN()};
    record.scale = below(random, 2) ? &scale : nullptr;
    record.found_inf = below(random, 3) ? &flags[below(random, 3)] : nullptr;
    record.extremes = extremes.data();
    record.squares = squares.data();
    record.histogram = histogram.data();
    record.updates = below(random, 2) ? updates.data() : nullptr;
    record.advance = below(random, 4) > 0;
    const int64_t before = on_cpu.clock[0];
    cpu::record(on_cpu.into(record));
    cuda::record(*EmulatedDevice(static_cast<int>(below(random, 4))), on_cuda.into(record));
    expect(on_cpu.clock[0] == before + record.advance && on_cpu.due[0] == (on_cpu.clock[0] % record.every == 0),
           "step %ld, due %d after step %ld", long(on_cpu.clock[0]), int(on_cpu.due[0]), long(before));
    expect(same_bits(on_cpu.clock, on_cuda.clock) && on_cpu.due == on_cuda.due, "clock: %ld, on the CPU %ld",
           long(on_cuda.clock[0]), long(on_cpu.clock[0]));
    expect(same_bits(on_cpu.trajectory, on_cuda.trajectory), "trajectories differ");
    expect(same_bits(on_cpu.steps, on_cuda.steps), "steps differ");
    expect(same_bits(on_cpu.numbers, on_cuda.numbers), "numbers differ");
    expect(same_bits(on_cpu.bins, on_cuda.bins), "bins differ");
  }
}

}  // namespace world
