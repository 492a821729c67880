// Which parameters' gradients overflowed.
#pragma once
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

namespace fusedamp {

// The non-finite gradient elements of one parameter in one step.
struct Overflow {
  std::string parameter;  // "AdamW group 0 parameter 1"
  std::vector<int64_t> shape;
  int64_t inf, nan;
  int64_t unscaled;  // finite before, but not after division by the scale
};

// The latest skipped step of one optimizer; false if none is known.
//
// `step` counts the calls of scaler.step(optimizer) from 1; it is 0 if no overflow was recorded.
struct OverflowReport {
  int64_t step = 0;
  std::vector<Overflow> overflows;

  explicit operator bool() const { return step > 0; }

  std::string str() const;
};

std::ostream& operator<<(std::ostream& out, const OverflowReport& report);

}  // namespace fusedamp
