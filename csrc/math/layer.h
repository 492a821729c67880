// Per-tensor inputs of update rules besides the step count: a scalar that persists between steps, and sums of squares,
// which a pass over the tensor measures before the step.
#pragma once
#include "vocab.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

constexpr int kMaxNorms = 2;

struct Layer {
  int64_t t;                  // this step, from 1 on
  double scalar;              // from the previous step
  double squares[kMaxNorms];  // of what Rule::measure() returned, over all elements; 0 while it is being measured
};

// Rules without these derive from this and get only the step count. The others have
//   double next_scalar(hyper, layer)       where kScalars is 1
//   void measure(coeffs, g, p, s, x)       where kNorms is not 0: x[i] is what to add up the squares of
struct Elementwise {
  static constexpr int kScalars = 0, kNorms = 0;
};

// |a| / |b|, or 1 where one of them is 0 or not a number.
FUSEDAMP_FN double norm_ratio(double a_squares, double b_squares) {
  return a_squares > 0.0 && b_squares > 0.0 ? sqrt(a_squares) / sqrt(b_squares) : 1.0;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
