// Sets all attributes that run_gemm sets, in the real library, which checks their sizes. This needs no GPU: without a
// handle, the library refuses the next call.
// usage: test_lt_attributes LIBRARY
#include <dlfcn.h>

#include "../../csrc/engine/cuda/lt_library.h"
#include "gemm_tests.h"

int main(int, char** argument) {
  using namespace gemms;
  if (!dlopen(argument[1], RTLD_LAZY | RTLD_LOCAL)) {
    puts(dlerror());
    return 2;
  }
  const fusedamp::cuda::LtLibrary& library = fusedamp::cuda::lt_library();
  expect(library.missing.empty(), "%s", library.missing.c_str());
  if (!library.missing.empty()) return 1;
  Random random(1);
  for (const Kind& kind : all_kinds()) {
    const Case c(kind, {24, 16, 8}, random);
    world::now_testing = fusedamp::cuda::describe(c.gemm);
    std::string message;
    try {
      const char* refused = fusedamp::cuda::run_gemm({nullptr, nullptr, 0, 90, {}}, c.gemm);
      message = refused ? refused : "it ran";
    } catch (const std::exception& error) {
      message = error.what();
    }
    const std::string wanted =
        "fusedamp: cublasLtMatmulAlgoGetHeuristic failed with CUBLAS_STATUS_NOT_INITIALIZED (1) for " +
        world::now_testing;
    expect(message == wanted, "%s", message.c_str());
    c.expect_untouched();
  }
  printf("%s: %ld checks, %ld failures\n", library.version.c_str(), world::checks, world::failures);
  return world::failures != 0;
}
