// Passes over lists of tensors on the CPU. Work is split into chunks over a flat index, small tensors are grouped, and
// a pass is one parallel region; results do not depend on the number of threads.
#pragma once
#include <functional>
#include <vector>

#include "kernels.h"

namespace fusedamp::cpu {

// Calls its second argument with each of 0 .. first argument - 1, on any number of threads.
using Parallel = std::function<void(int64_t units, const std::function<void(int64_t unit)>& run)>;

// One optimizer step of all groups; consecutive groups of one rule share a pass. If *scalars.found_inf is not 0, only
// the log is changed.
void step(const StepTable& table, const StepGroups& groups, const StepScalars& scalars, const StepLog& log,
          const Tally& tally, const Parallel& parallel);

// Writes each row's `squares`: the sums over its buffers, which the caller adds up over ranks. Masters follow modified
// weights already here. Writes nothing if *scalars.found_inf is not 0, and for rules without norms.
void measure(const StepTable& table, const StepGroups& groups, const StepScalars& scalars, const Parallel& parallel);

// Gradient check: norms, and counts of non-finite elements.
void grad_stats(const std::vector<GradRow>& rows, float inv_scale, double norm_type, const StatsOutputs& out,
                const Numerics& numerics, const Parallel& parallel);

// The same, and the results derived from it. `per_tensor` as in StatsOutputs; null: not wanted.
void check_grads(const std::vector<GradRow>& rows, const GradCheck& check, double* per_tensor, const Numerics& numerics,
                 const Parallel& parallel);

// grads *= inv_scale; returns true if an element is not finite.
bool unscale(const std::vector<GradRow>& rows, float inv_scale, const Parallel& parallel);

// A master or state into another format.
void recode(const Recoding& job, const Parallel& parallel);

// What a watch keeps of a step.
void record(const StepRecord& record);

}  // namespace fusedamp::cpu
