// What an engine is given: rows of addresses. The ops room has checked them; nothing here knows torch.
#pragma once
#include "dtype.h"

namespace fusedamp {

constexpr int kMaxStates = 3, kMaxHyper = 8;

// One parameter tensor of a step. All its buffers have `numel` elements in the same order of memory.
struct StepRow {
  const void* grad;
  void* param;
  void* master;              // float; null: `param` itself is stepped
  void* states[kMaxStates];  // float, or double where param is f64; then the rule's scalars, each one double
  float* step;               // one element: how many steps this tensor has taken
  int64_t numel;
  DType grad_dtype, param_dtype;
};

// One gradient of a read pass or of unscale_.
struct GradRow {
  void* grad;
  int64_t numel;
  DType dtype;
};

// The scalars of a step. A null pointer stands for 1 (inv_scale, clip_coef), "no overflow" (found_inf), or the plain
// lr.
struct StepScalars {
  double hyper[kMaxHyper];
  double lr;
  bool maximize;
  const void* lr_tensor;
  DType lr_dtype;
  const float *inv_scale, *clip_coef, *found_inf;
};

}  // namespace fusedamp
