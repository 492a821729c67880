// Input of an engine: rows of addresses, checked by ops/. Nothing here depends on torch.
#pragma once
#include "../include/fusedamp/rows.h"

namespace fusedamp {

// The rows of a step, and the address of each gradient in a separate table, because gradients move more often than rows
// change.
struct StepTable {
  const StepRow* rows;
  void* const* grads;
  int64_t count;
};

struct StepGroups {
  const StepGroup* groups;
  int64_t count;
};

// The scalars of a step. A null pointer means 1 (inv_scale, clip_coef) or "no overflow" (found_inf).
struct StepScalars {
  const float *inv_scale, *clip_coef, *found_inf;
};

// Where a step writes what it changed: four doubles per row of the whole table. moved: elements whose FP32 (FP64) value
// changed; lost: those of them that a 16-bit weight alone would not feel; the sums of (new - old)^2 and old^2. Written
// if *due is not 0 and the step is taken. A null `updates`: no tally; a null `due`: it is due.
struct Tally {
  double* updates;
  const int32_t* due;
};
constexpr int kTallies = 4;

// The log of a step. It adds 1 to *steps; if it is skipped, it copies `counts` to `last_counts` and *steps to
// *last_step. Null pointers: no log.
struct StepLog {
  int64_t* steps;
  const int64_t* counts;
  int64_t* last_counts;
  int64_t* last_step;
  int64_t words;  // of `counts`
};

// A master or state in one format, and the same in another. What becomes what, by dtypes: with a `weight`, f32 or i16
// (a remainder) -> f32, its master; f32 -> i16, which rewrites the weight. Without, f16, bf16, f32 or f64 -> i8 or u8,
// to nearest, which writes scales; i8 or u8 -> f32. All lists have `numel` elements in the same order of memory.
struct Recoding {
  const void* source;
  void *target, *weight;  // weight: f16 or bf16
  float* scales;          // of 8-bit values: one for each block of kScaleBlock elements
  int64_t numel;
  DType source_dtype, target_dtype, weight_dtype;
};

// One gradient of a gradient check or of unscale_.
struct GradRow {
  void* grad;
  int64_t numel;
  DType dtype;
  uint8_t unused[7] = {};
};

// Outputs of a gradient check.
struct StatsOutputs {
  float* found_inf;    // 0 or 1
  double* total;       // sum |g * inv_scale|^p over all gradients; the maximum for p = inf
  double* per_tensor;  // the same per gradient
  int64_t* counts;     // three per tensor: infs, NaNs, overflows (finite, but not when unscaled)
};

// What a gradient check may tell beside, about the elements as they are stored, before inv_scale. Null: nothing.
struct Numerics {
  double* extremes;    // three per tensor: the largest |s| (infinity if one is not finite), zeros, 0 < |s| < 2^-14
  int64_t* histogram;  // kBins per tensor (math/bins.h); rewritten where *due is not 0
  const int32_t* due;
  bool lean;      // where *due is 0, zeros and small ones need not be counted
  bool only_due;  // where *due is 0, nothing is read, and no result is written
};

// Additional inputs and outputs of a gradient check that computes the clip coefficient.
struct GradCheck {
  const float* scale;  // gradients are checked as multiplied by 1 / *scale
  double norm_type, max_norm;
  const void* max_norm_tensor;  // null: `max_norm`
  DType max_norm_dtype;
  bool wide;  // whether `norm` is FP64, else FP32

  float *inv_scale, *clip_coef, *found_inf;  // 1 / *scale; min(1, max_norm / (norm + 1e-6)); 0 or 1
  void* norm;
  int64_t* counts;  // as StatsOutputs
};

// What a watch keeps of one step in rings on the device. A ring has `history` slots; step s uses slot s / every.
struct StepRecord {
  int64_t* clock;  // [2]: the number of the current step, from 1; 0, or while this runs the blocks that have finished
  int32_t* due;    // whether that number is a multiple of `every`
  int64_t every, history, length, count;  // length: rows of `trajectory`; count: tensors
  bool only_due;                          // whether gradients were read in due steps only
  bool advance;                           // whether the step ends here
  const float *scale, *found_inf;         // null: 1; no overflow
  const double *extremes, *squares;       // [count, 3] and [count], as a gradient check has them
  const double* updates;                  // [count, 4], as a step has them; null: none
  const int64_t* histogram;               // [count, 64]
  double* trajectory;  // [length, 4], of each step: its number, scale, whether it was skipped, the largest |gradient|
  double* steps;       // [history, 4]: number, scale, whether it was skipped, whether it has updates
  double* numbers;     // [history, count, 6]: the largest |gradient|, squares, updates
  int64_t* bins;       // [history, count, 64]
};

}  // namespace fusedamp
