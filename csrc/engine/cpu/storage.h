// How a step reads and writes weights and states, a block at a time: in place where they are stored in the type of the
// arithmetic, else through the L1 cache. `at` is the block's first element, a multiple of kBlock; n its length.
#pragma once
#include "../table.h"
#include "convert.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// Where a 16-bit weight is not its master rounded, somebody wrote the weight: the master follows it.
FUSEDAMP_FN void follow(DType dtype, const uint16_t* param, float* master, int64_t n) {
  if (!narrows_otherwise(dtype, master, param, n)) return;
  uint16_t rounded[kBlock];
  narrow(dtype, master, rounded, n);
  for (int64_t i = 0; i < n; ++i)
    if (rounded[i] != param[i]) master[i] = dtype == DType::f16 ? f16_to_float(param[i]) : bf16_to_float(param[i]);
}

// What is stepped: the master where there is one, else the weight.
FUSEDAMP_FN double* load_weight(const StepRow& row, int64_t at, int64_t, double*) {
  return static_cast<double*>(row.param) + at;
}
FUSEDAMP_FN float* load_weight(const StepRow& row, int64_t at, int64_t n, float* staging) {
  if (!is_16bit(row.param_dtype)) return static_cast<float*>(row.param) + at;
  const uint16_t* param = static_cast<const uint16_t*>(row.param) + at;
  if (!row.master) {
    widen(row.param_dtype, param, staging, n);
    return staging;
  }
  float* master = static_cast<float*>(row.master) + at;
  follow(row.param_dtype, param, master, n);
  return master;
}

// After the step. `weight` is what load_weight returned.
FUSEDAMP_FN void store_weight(const StepRow&, int64_t, int64_t, const double*) {}
FUSEDAMP_FN void store_weight(const StepRow& row, int64_t at, int64_t n, const float* weight) {
  if (is_16bit(row.param_dtype)) narrow(row.param_dtype, weight, static_cast<uint16_t*>(row.param) + at, n);
}

template <class V>
FUSEDAMP_FN V* load_state(const StepRow& row, int j, int64_t at, int64_t, V*) {
  return static_cast<V*>(row.states[j]) + at;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
