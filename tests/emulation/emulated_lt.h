// The emulated library (cublaslt.cpp) as tests see it, and a device for it.
#pragma once
#include <dlfcn.h>

#include "gemm_tests.h"

namespace gemms {

using fusedamp::cuda::LtDevice;
using fusedamp::cuda::run_gemm;
using world::now_testing;

inline int64_t (*count)(int) = nullptr;
inline void (*refuse)(int, unsigned, int) = nullptr;
enum Count { kHeuristics, kProducts, kBrokenRules, kObjects };
enum Place { kNowhere, kHeuristic, kNothingFound, kState, kProduct, kAccumulation };
constexpr unsigned kPlain = 1, kBgradB = 512;
constexpr int kInvalidValue = 7, kArchMismatch = 8, kInternalError = 14, kNotSupported = 15;

inline void* load(const std::string& path) {
  void* object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!object) {
    puts(dlerror());
    exit(2);
  }
  return object;
}

// A device with workspaces of exactly the asked size, on odd addresses.
struct Device : LtDevice {
  explicit Device(int index = 0, int capability = 90) : LtDevice{the_handle, nullptr, index, capability, {}} {
    stream = reinterpret_cast<CUstream_st*>(0x57);
    scratch = [this](int64_t bytes) {
      asked.push_back(bytes);
      kept.push_back(world::allocate(bytes + 1, 0));
      return kept.back().get() + 1;
    };
  }
  Device(const Device&) = delete;
  std::vector<int64_t> asked;
  std::vector<world::Memory> kept;
  static inline void* the_handle = nullptr;
};

inline std::string name_of(const Case& c) { return fusedamp::cuda::describe(c.gemm); }

inline void run_right(const LtDevice& device, Case& c) {
  now_testing = name_of(c);
  const char* refused = run_gemm(device, c.gemm);
  expect(!refused, "is refused: %s", refused ? refused : "");
  if (!refused) c.expect_right();
}

inline void expect_refused(const LtDevice& device, const Case& c, const std::string& why) {
  const char* refused = run_gemm(device, c.gemm);
  expect(refused && std::string(refused) == why, "says: %s; expected: %s", refused ? refused : "nothing", why.c_str());
  c.expect_untouched();
}

}  // namespace gemms
