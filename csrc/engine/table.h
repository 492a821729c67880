// What an engine is given: rows of addresses. The ops room has checked them; nothing here knows torch.
#pragma once
#include "dtype.h"

namespace fusedamp {

constexpr int kMaxStates = 3, kMaxHyper = 8;

// One parameter tensor of a step. All its buffers have `numel` elements in the same order of memory.
struct StepRow {
  void* param;
  void* master;               // null: `param` itself is stepped
  void* states[kMaxStates];   // f64 where param is f64; then the rule's scalars, each one double
  float* scales[kMaxStates];  // of 8-bit states: one for each block of kScaleBlock elements
  float* step;                // one element: how many steps this tensor has taken (math/count.h)
  int64_t numel, seed;        // seed: of the tensor's random numbers
  int32_t group;              // index of its StepGroup
  DType grad_dtype, param_dtype;
  DType master_dtype;      // f32, or i16: the remainder of a split master
  DType state_dtype;       // f32, bf16 (rounded stochastically), f64, or i8: 8-bit codes, whose sign the rule knows
  bool maximize;           // of its group, as the next one; here, so that kernels that update elements need no group
  bool stochastic;         // how 16-bit weights without masters are rounded
  uint8_t unused[6] = {};  // where padding would be: equal rows have equal bytes
};
static_assert(sizeof(StepRow) == 13 * 8, "rows are made outside of C++, too, in words of 8 bytes");

// What the rows of one group share. Groups follow each other: the first one's rows, then the second one's ...
struct StepGroup {
  double hyper[kMaxHyper];  // the rule's Hyper
  double lr;
  const void* lr_tensor;  // one element; null: `lr`
  int64_t first, count;   // its rows
  int32_t rule;           // a RuleId
  DType lr_dtype;         // f32 or f64
  uint8_t unused[3] = {};
};
static_assert(sizeof(StepGroup) == 13 * 8, "as for rows");

// The rows of a step, and beside each one the address of its gradient: that one moves, what is in a row seldom does.
struct StepTable {
  const StepRow* rows;
  void* const* grads;
  int64_t count;
};

struct StepGroups {
  const StepGroup* groups;
  int64_t count;
};

// The scalars of a step. A null pointer stands for 1 (inv_scale, clip_coef) or "no overflow" (found_inf).
struct StepScalars {
  const float *inv_scale, *clip_coef, *found_inf;
};

// Where a step leaves a trace of itself. It adds 1 to *steps; where it is skipped, it copies `counts` to `last_counts`
// and *steps to *last_step. Null pointers: none of it.
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

// One gradient of a read pass or of unscale_.
struct GradRow {
  void* grad;
  int64_t numel;
  DType dtype;
  uint8_t unused[7] = {};
};

// What a read pass writes.
struct StatsOutputs {
  float* found_inf;    // 0 or 1
  double* total;       // sum |g * inv_scale|^p over all gradients; the maximum for p = inf
  double* per_tensor;  // that of each gradient
  int64_t* counts;     // three per tensor: infs, NaNs, overflows (finite, but not when unscaled)
};

// A read pass that concludes: what it takes besides the gradients, and what it writes.
struct GradCheck {
  const float* scale;  // gradients are looked at times 1 / *scale
  double norm_type, max_norm;
  const void* max_norm_tensor;  // null: `max_norm`
  DType max_norm_dtype;
  bool wide;  // whether `norm` is FP64, else FP32

  float *inv_scale, *clip_coef, *found_inf;  // 1 / *scale; min(1, max_norm / (norm + 1e-6)); 0 or 1
  void* norm;
  int64_t* counts;  // as StatsOutputs
};

}  // namespace fusedamp
