// Overflow reports as text.
#include "../overflow.h"

#include <ostream>

#include "text.h"

namespace fusedamp {

std::string OverflowReport::str() const {
  if (step == 0) return "no overflow recorded";
  std::string lines = detail::text("step ", step, " was skipped:");
  for (const Overflow& o : overflows) {
    std::string what;
    const auto add = [&](int64_t n, const char* kind) {
      if (n) what += detail::text(what.empty() ? "" : ", ", n, " ", kind);
    };
    add(o.inf, "inf");
    add(o.nan, "NaN");
    add(o.unscaled, "too large once unscaled");
    lines += detail::text("\n  ", o.parameter, " ", detail::list_text(o.shape), ": ", what);
  }
  return overflows.empty() ? lines + "\n  by no gradient that still exists on this rank" : lines;
}

std::ostream& operator<<(std::ostream& out, const OverflowReport& report) { return out << report.str(); }

}  // namespace fusedamp
