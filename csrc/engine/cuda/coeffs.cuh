// A step's coefficients, one set per tensor, made on the device: step counts, learning rate and scale live there.
#pragma once
#include "chunks.cuh"
#include "element.cuh"

#include "../lane.h"

namespace fusedamp::cuda {

template <class Rule, class V>
using CoeffsOf = typename Rule::template Coeffs<V>;

template <class Rule>
__device__ __forceinline__ typename Rule::Hyper hyper_of(const StepScalars& scalars) {
  typename Rule::Hyper hyper;
  memcpy(&hyper, scalars.hyper, sizeof hyper);
  return hyper;
}

// Of one tensor, by one thread. `squares` may be null: they are to be measured yet.
template <class Rule, class V>
__device__ __forceinline__ CoeffsOf<Rule, V> coeffs_for(const StepRow& row, const StepScalars& scalars,
                                                        const double* squares) {
  const double lr = scalars.lr_tensor ? value_at<double>(scalars.lr_tensor, scalars.lr_dtype, 0) : scalars.lr;
  const auto exact = coeffs_of<Rule>(hyper_of<Rule>(scalars), lr, layer_of<Rule>(row, squares));
  return round_coeffs<Rule::template Coeffs, V>(exact);
}

// One thread per tensor. Rules that measure norms take their step count on afterwards, in measure.cuh.
template <class Rule, class V>
__global__ void __launch_bounds__(kBlock)
    prepare_kernel(const Table<StepRow> table, const StepScalars scalars, CoeffsOf<Rule, V>* coeffs) {
  if (overflowed(scalars.found_inf)) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= table.row_count) return;
  const StepRow& row = table.rows[i].row;
  coeffs[i] = coeffs_for<Rule, V>(row, scalars, nullptr);
  if constexpr (Rule::kNorms == 0) advance<Rule>(row, hyper_of<Rule>(scalars), layer_of<Rule>(row, nullptr));
}

__device__ __forceinline__ float grad_scale_of(const StepScalars& scalars) {
  const float scale = (scalars.inv_scale ? *scalars.inv_scale : 1.0f) * (scalars.clip_coef ? *scalars.clip_coef : 1.0f);
  return scalars.maximize ? -scale : scale;
}

}  // namespace fusedamp::cuda
