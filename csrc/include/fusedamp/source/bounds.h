// What the values of options may be.
#pragma once
#include "../options.h"
#include "numbers.h"

namespace fusedamp::optim::detail {

constexpr double kLargest = 3.4028234663852886e38;  // steps compute with FP32: beyond it, 0 * lr would be NaN

inline void check_bounds(const std::string& where, const Bounds& bounds, double value, const std::string& item = "") {
  if (value >= bounds.low && value < bounds.below && std::abs(value) <= kLargest) return;
  const std::string wanted = std::isinf(bounds.below) ? text("a finite number", std::isinf(bounds.low) ? "" : " >= 0",
                                                             ", at most 3.4e38 as in FP32")
                                                      : text("a number >= ", bounds.low, " and < ", bounds.below);
  refuse_value(text(where, " ", bounds.name, item, " is ", repr(value), "; expected ", wanted, ". Pass such a value."));
}

[[noreturn]] inline void refuse_seed(const std::string& where, const std::string& got) {
  refuse_value(where + " rounding_seed is " + got +
               "; expected a whole number from 0 to 2**31 - 1, or None for one that is unique in this process. Pass "
               "one.");
}

}  // namespace fusedamp::optim::detail
