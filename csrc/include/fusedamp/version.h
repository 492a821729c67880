// The version of these headers, and a check that the library has the same.
#pragma once

// Checks of options and gradients would let NaN pass.
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "fusedamp looks for inf and NaN: compile this file without fast math, or add -fno-finite-math-only"
#endif

#include <cstring>
#include <stdexcept>
#include <string>

// As in pyproject.toml; fusedampConfigVersion.cmake reads it here.
#define FUSEDAMP_VERSION_MAJOR 0
#define FUSEDAMP_VERSION_MINOR 1
#define FUSEDAMP_VERSION_PATCH 0
#define FUSEDAMP_VERSION "0.1.0"

// The version of libfusedamp_cpu.so.
extern "C" __attribute__((visibility("default"))) const char* fusedamp_version() noexcept;

namespace fusedamp {

// A linker may drop a library of which a program uses no symbol, and its ops with it. This call keeps it.
inline const char* const library_version = fusedamp_version();

// Throws std::runtime_error if the library that the program has loaded is not of these headers' version. The
// constructors of fusedamp's classes call it: an error before main() would end the program without a message.
inline void check_version() {
  if (std::strcmp(fusedamp_version(), FUSEDAMP_VERSION) != 0) {
    throw std::runtime_error("fusedamp's headers and library are of different versions: this program was built with " +
                             std::string(FUSEDAMP_VERSION) + ", and libfusedamp_cpu.so is " + fusedamp_version() +
                             ". Build the program again with the installed package, or install that version.");
  }
}

}  // namespace fusedamp
