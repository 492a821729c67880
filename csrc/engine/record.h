// Writes a StepRecord, on every device.
#pragma once
#include "../math/bins.h"
#include "table.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

constexpr int64_t kExtremes = 3, kNumbers = 2 + kTallies;

// The current step.
struct RecordedStep {
  int64_t number, slot;
  bool due, skipped;
};

FUSEDAMP_FN RecordedStep recorded_step(const StepRecord& record) {
  const int64_t number = record.clock[0];
  const bool skipped = record.found_inf && !(*record.found_inf == 0.0f);
  return {number, number / record.every % record.history, *record.due != 0, skipped};
}

// Worker `worker` of `workers` does its share of the tensors.
FUSEDAMP_FN void record_tensors(const StepRecord& record, const RecordedStep& step, int64_t worker, int64_t workers) {
  if (!step.due) return;
  const bool has_updates = record.updates && !step.skipped;
  int64_t* bins = record.bins + step.slot * record.count * kBins;
  for (int64_t i = worker; i < record.count * kBins; i += workers) bins[i] = record.histogram[i];
  for (int64_t i = worker; i < record.count; i += workers) {
    double* numbers = record.numbers + (step.slot * record.count + i) * kNumbers;
    numbers[0] = record.extremes[kExtremes * i];
    numbers[1] = record.squares[i];
    for (int64_t j = 0; j < kTallies; ++j) numbers[2 + j] = has_updates ? record.updates[kTallies * i + j] : 0.0;
  }
}

// `largest`: of all tensors.
FUSEDAMP_FN void record_step(const StepRecord& record, const RecordedStep& step, double largest) {
  const double scale = record.scale ? *record.scale : 1.0, skipped = step.skipped ? 1.0 : 0.0;
  if (record.trajectory) {
    double* row = record.trajectory + (step.number - 1) % record.length * 4;
    row[0] = static_cast<double>(step.number);
    row[1] = scale;
    row[2] = skipped;
    row[3] = record.only_due && !step.due ? __builtin_nan("") : largest;
  }
  if (!step.due) return;
  double* row = record.steps + step.slot * 4;
  row[0] = static_cast<double>(step.number);
  row[1] = scale;
  row[2] = skipped;
  row[3] = record.updates && !step.skipped ? 1.0 : 0.0;
}

// After all workers are done with the step.
FUSEDAMP_FN void advance(const StepRecord& record) {
  if (!record.advance) return;
  const int64_t next = record.clock[0] + 1;
  record.clock[0] = next;
  *record.due = next % record.every == 0;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
