// Uses what newer systems would give newer versions, and all that .ci/newer_names.cpp defines.
#include <dlfcn.h>
#include <pthread.h>

#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

namespace {
int destroyed = 0;
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
  Error(const Error&) = default;
  ~Error() override { destroyed += 1; }
};

bool streams() {
  std::ostringstream out;
  out << 12 << "a";
  std::stringstream both;
  both << "7 8";
  int first = 0, second = 0;
  both >> first >> second;
  return out.str() == "12a" && first == 7 && second == 8;
}

// The exception lives as long as the last pointer to it, and no longer.
bool exception_pointers() {
  {
    std::exception_ptr kept;
    try {
      throw Error("thrown");
    } catch (...) {
      kept = std::current_exception();
    }
    std::exception_ptr copy = kept;
    kept = nullptr;
    if (destroyed != 0 || !copy) return false;
    try {
      std::rethrow_exception(copy);
    } catch (const Error& error) {
      if (std::string(error.what()) != "thrown") return false;
    }
    if (destroyed != 0) return false;
  }
  return destroyed == 1;
}

bool refuses_lengths(long length) {
  try {
    delete[] new long[length];
  } catch (const std::bad_array_new_length&) {
    return true;
  }
  return false;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) int failures(double x, long length) {
  auto counted = std::make_shared<int>(1);
  auto again = counted;
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, [] {});
  const bool math = std::abs(std::log(std::exp(x)) - x) < 1e-12 && std::pow(x, 2.0) == x * x;
  const bool loader = dlsym(RTLD_DEFAULT, "malloc") != nullptr;
  return !streams() + 2 * !exception_pointers() + 4 * !refuses_lengths(length) + 8 * !math + 16 * !loader +
         32 * (counted.use_count() != 2);
}
