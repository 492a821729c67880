// What an engine is given: rows of addresses. The ops room has checked them; nothing here knows torch.
#pragma once
#include "dtype.h"

namespace fusedamp {

constexpr int kMaxStates = 3, kMaxHyper = 8;

// One parameter tensor of a step. All its buffers have `numel` elements in the same order of memory.
struct StepRow {
  const void* grad;
  void* param;
  void* master;               // null: `param` itself is stepped
  void* states[kMaxStates];   // f64 where param is f64; then the rule's scalars, each one double
  float* scales[kMaxStates];  // of 8-bit states: one for each block of kScaleBlock elements
  float* step;                // one element: how many steps this tensor has taken (math/count.h)
  int64_t numel, seed;        // seed: of the tensor's random numbers
  DType grad_dtype, param_dtype;
  DType master_dtype;      // f32, or i16: the remainder of a split master
  DType state_dtype;       // f32, bf16 (rounded stochastically), f64, or i8: 8-bit codes, whose sign the rule knows
  uint8_t unused[4] = {};  // where padding would be: equal rows have equal bytes
};

// One gradient of a read pass or of unscale_.
struct GradRow {
  void* grad;
  int64_t numel;
  DType dtype;
  uint8_t unused[7] = {};
};

// The scalars of a step. A null pointer stands for 1 (inv_scale, clip_coef), "no overflow" (found_inf), or the plain
// lr.
struct StepScalars {
  double hyper[kMaxHyper];
  double lr;
  bool maximize;
  bool stochastic;  // how 16-bit weights without masters are rounded
  const void* lr_tensor;
  DType lr_dtype;
  const float *inv_scale, *clip_coef, *found_inf;
};

}  // namespace fusedamp
