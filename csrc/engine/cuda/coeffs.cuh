// Computes a step's coefficients, one set per tensor, on the device, because step counts, learning rate and scale are
// there.
#pragma once
#include "element.cuh"
#include "groups.cuh"

#include "../lane.h"
#include "../passes.h"

namespace fusedamp::cuda {

template <class Rule, class V>
using CoeffsOf = typename Rule::template Coeffs<V>;

template <class Rule>
__device__ __forceinline__ typename Rule::Hyper hyper_of(const StepGroup& group) {
  typename Rule::Hyper hyper;
  memcpy(&hyper, group.hyper, sizeof hyper);
  return hyper;
}

// For one tensor, by one thread. `squares` may be null: not measured yet.
template <class Rule, class V>
__device__ __forceinline__ CoeffsOf<Rule, V> coeffs_for(const StepRow& row, const StepGroup& group,
                                                        const double* squares) {
  const double lr = group.lr_tensor ? value_at<double>(group.lr_tensor, group.lr_dtype, 0) : group.lr;
  const auto exact = coeffs_of<Rule>(hyper_of<Rule>(group), lr, layer_of<Rule>(row, squares));
  return round_coeffs<Rule::template Coeffs, V>(exact);
}

// One thread per tensor. The first launch of a step updates its log. Rules with norms update the step count later, in
// measure.cuh.
template <class Rule, class V>
__global__ void __launch_bounds__(kBlock)
    prepare_kernel(const StepRows table, const __grid_constant__ GroupPacket packet, const StepScalars scalars,
                   const StepLog log, CoeffsOf<Rule, V>* coeffs) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool skipped = overflowed(scalars.found_inf);
  keep_log(log, skipped, i, int64_t{gridDim.x} * blockDim.x);
  if (skipped || i >= table.row_count) return;
  const StepRow& row = table.rows[i].row;
  const StepGroup* group = packet.of(row);
  if (!group) return;
  coeffs[i] = coeffs_for<Rule, V>(row, *group, nullptr);
  if constexpr (Rule::kNorms == 0) advance<Rule>(row, hyper_of<Rule>(*group), layer_of<Rule>(row, nullptr));
}

__device__ __forceinline__ float grad_scale_of(const StepRow& row, const StepScalars& scalars) {
  const float scale = (scalars.inv_scale ? *scalars.inv_scale : 1.0f) * (scalars.clip_coef ? *scalars.clip_coef : 1.0f);
  return row.maximize ? -scale : scale;
}

}  // namespace fusedamp::cuda
