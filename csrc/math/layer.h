// What update rules may know of a whole tensor besides its step count: a scalar that is carried from step to step, and
// sums of squares, which a pass over the tensor measures before the step.
#pragma once
#include "vocab.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

constexpr int kMaxNorms = 2;

struct Layer {
  int64_t t;                  // this step, from 1 on
  double scalar;              // as the step before left it
  double squares[kMaxNorms];  // of what Rule::measure() returned, over all elements; 0 while it is being measured
};

// Rules that need none of it derive from this and get the step count alone. The others have
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
