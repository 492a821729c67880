// What one instruction set offers: functions over chunks. kernels.cpp is compiled once per instruction set.
#pragma once
#include "../../math/rules.h"
#include "../table.h"

namespace fusedamp::cpu {

// `count` elements of rows[row] from element `first` on.
struct Chunk {
  int64_t row, first, count;
};

enum class Norm : int { kTwo, kOne, kMax, kGeneral };

// What a read pass finds in one chunk.
struct ChunkStats {
  double power_sum;               // sum |g * inv_scale|^p; the maximum for kMax
  int64_t infs, nans, overflows;  // overflows: finite, but infinite after the multiplication
};

struct StatsJob {
  float inv_scale;
  Norm norm;
  double p;
};

// Rows of one rule, and all groups of the step.
struct StepPass {
  StepTable table;
  const StepGroup* groups;
  StepScalars scalars;
};

struct Kernels {
  const char* name;
  // squares: kMaxNorms sums for each row, of what the rule measures; null for rules that measure nothing.
  void (*step[kRuleCount])(const StepPass& pass, const Chunk* chunks, int64_t chunk_count, const double* squares);
  // Those sums over one chunk. Null for rules that measure nothing.
  void (*measure[kRuleCount])(const StepPass& pass, const Chunk& chunk, double* squares);
  // Step counts and scalars of rows that have taken their step.
  void (*advance[kRuleCount])(const StepPass& pass, const double* squares);
  void (*stats)(const GradRow* rows, const Chunk& chunk, const StatsJob& job, ChunkStats* out);
  bool (*unscale)(const GradRow* rows, const Chunk& chunk, float inv_scale);  // true: something is non-finite
  void (*recode)(const Recoding& job, int64_t first, int64_t count);          // `first`: a multiple of a scale block
};

extern const Kernels kKernels_baseline;
#if defined(__x86_64__)
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avx512;
#endif

// The best set that this processor has, or the one that FUSEDAMP_CPU_TARGET names. Chosen once.
// Throws std::runtime_error where the variable names one that is unknown or that the processor lacks.
const Kernels& kernels();

}  // namespace fusedamp::cpu
