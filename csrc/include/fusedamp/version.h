// The version of these headers, and that of the library.
#pragma once

namespace fusedamp {

inline void check_version() {}

}  // namespace fusedamp
