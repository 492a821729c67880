// Selects the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedamp::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool here;  // whether this processor supports it
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;  // clang++ 14 does not know the name "f16c"
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Candidate best_first[] = {{&kKernels_avx512, avx512}, {&kKernels_avx2, avx2}, {&kKernels_baseline, true}};
#else
  const Candidate best_first[] = {{&kKernels_baseline, true}};
#endif
  const char* wanted = std::getenv("FUSEDAMP_CPU_TARGET");
  std::string known;
  for (const Candidate& c : best_first) {
    if (!wanted || !*wanted) {
      if (c.here) return *c.kernels;
      continue;
    }
    known += std::string(known.empty() ? "" : ", ") + c.kernels->name + (c.here ? "" : " (not on this processor)");
    if (c.here && !std::strcmp(wanted, c.kernels->name)) return *c.kernels;
  }
  throw std::runtime_error(std::string("FUSEDAMP_CPU_TARGET=") + wanted + " cannot be used; expected one of: " + known +
                           ". Unset it to let fusedamp choose");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fusedamp::cpu
