// The passes over lists of tensors on the CPU. Work is cut into chunks over a flat index, small tensors are grouped,
// and a pass is one parallel region; results do not depend on the number of threads.
#pragma once
#include <functional>
#include <vector>

#include "kernels.h"

namespace fusedamp::cpu {

// Calls its second argument once for each of 0 .. first argument - 1, on as many threads as it sees fit.
using Parallel = std::function<void(int64_t units, const std::function<void(int64_t unit)>& run)>;

struct ListStats {
  double total = 0.0;
  bool found_inf = false;
};

// One optimizer step. Where *scalars.found_inf is not 0, nothing is changed.
void step(RuleId rule, const std::vector<StepRow>& rows, const StepScalars& scalars, const Parallel& parallel);

// One read pass. per_tensor[i]: power sum of tensor i; counts[3 * i ...]: its infs, NaNs and overflows.
ListStats grad_stats(const std::vector<GradRow>& rows, float inv_scale, double norm_type, double* per_tensor,
                     int64_t* counts, const Parallel& parallel);

// grads *= inv_scale; true where anything is non-finite.
bool unscale(const std::vector<GradRow>& rows, float inv_scale, const Parallel& parallel);

}  // namespace fusedamp::cpu
