// Functions over chunks for one instruction set. kernels.cpp is compiled once per instruction set.
#pragma once
#include "../../math/rules.h"
#include "../table.h"

namespace fusedamp::cpu {

// `count` elements of rows[row] from element `first` on.
struct Chunk {
  int64_t row, first, count;
};

enum class Norm : int { kTwo, kOne, kMax, kGeneral };

// Result of the gradient check of one chunk.
struct ChunkStats {
  double power_sum;               // sum |g * inv_scale|^p; the maximum for kMax
  int64_t infs, nans, overflows;  // overflows: finite, but infinite after the multiplication
};

// Of the elements of a chunk as they are stored.
struct ChunkExtremes {
  double largest;        // |s|; infinity if an element is not finite
  int64_t zeros, small;  // small: 0 < |s| < 2^-14
};

// The tally of one chunk (table.h).
struct ChunkTally {
  int64_t moved, lost;
  double update, weight;  // sums of squares
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
  // squares: kMaxNorms sums of squares per row; null for rules without norms.
  void (*step[kRuleCount])(const StepPass& pass, const Chunk* chunks, int64_t chunk_count, const double* squares);
  // The same step, and a tally of each chunk.
  void (*tallied_step[kRuleCount])(const StepPass& pass, const Chunk* chunks, int64_t chunk_count,
                                   const double* squares, ChunkTally* found);
  // Those sums over one chunk. Null for rules without norms.
  void (*measure[kRuleCount])(const StepPass& pass, const Chunk& chunk, double* squares);
  // Updates step counts and scalars of rows after their step.
  void (*advance[kRuleCount])(const StepPass& pass, const double* squares);
  void (*stats)(const GradRow* rows, const Chunk& chunk, const StatsJob& job, ChunkStats* out);
  void (*stats_with_extremes)(const GradRow* rows, const Chunk& chunk, const StatsJob& job, ChunkStats* out, bool all,
                              ChunkExtremes* extremes);                       // not `all`: the largest alone
  void (*histogram)(const GradRow* rows, const Chunk& chunk, int64_t* bins);  // adds to kBins numbers
  bool (*unscale)(const GradRow* rows, const Chunk& chunk, float inv_scale);  // true: an element is not finite
  void (*recode)(const Recoding& job, int64_t first, int64_t count);          // `first`: a multiple of a scale block
};

extern const Kernels kKernels_baseline;
#if defined(__x86_64__)
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avx512;
#endif

// The best set that this processor supports, or the one that FUSEDAMP_CPU_TARGET names. Chosen once.
// Throws std::runtime_error if the variable names a set that is unknown or unsupported by the processor.
const Kernels& kernels();

}  // namespace fusedamp::cpu
