// Checks in C++: what does not hold is collected, and told to Python.
#pragma once
#include <functional>
#include <string>

#include "program.h"

namespace {

std::string failures;

void expect(bool holds, const char* what, int line) {
  if (!holds) failures += fusedamp::detail::text("line ", line, ": ", what, "\n");
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

}  // namespace
