// The passes over lists of tensors on the CPU. Work is cut into chunks over a flat index, small tensors are grouped,
// and a pass is one parallel region; results do not depend on the number of threads.
#pragma once
#include <functional>
#include <vector>

#include "kernels.h"

namespace fusedamp::cpu {

// Calls its second argument once for each of 0 .. first argument - 1, on as many threads as it sees fit.
using Parallel = std::function<void(int64_t units, const std::function<void(int64_t unit)>& run)>;

// One optimizer step of all groups, in which the groups of one rule that follow each other share a pass. Where
// *scalars.found_inf is not 0, nothing but the log is changed.
void step(const StepTable& table, const StepGroups& groups, const StepScalars& scalars, const StepLog& log,
          const Parallel& parallel);

// One read pass.
void grad_stats(const std::vector<GradRow>& rows, float inv_scale, double norm_type, const StatsOutputs& out,
                const Parallel& parallel);

// The same, and what follows from it.
void check_grads(const std::vector<GradRow>& rows, const GradCheck& check, const Parallel& parallel);

// grads *= inv_scale; true where anything is non-finite.
bool unscale(const std::vector<GradRow>& rows, float inv_scale, const Parallel& parallel);

// A master or state into another format.
void recode(const Recoding& job, const Parallel& parallel);

}  // namespace fusedamp::cpu
