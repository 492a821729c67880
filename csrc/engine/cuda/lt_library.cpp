#include "lt_library.h"

#include <dlfcn.h>

namespace fusedamp::cuda {
namespace {

// Through libtorch_cuda.so, dlsym searches the libraries that torch itself is linked to. This matters where two
// versions are loaded. The sonames are for a torch that links cuBLASLt otherwise.
constexpr const char* kNames[] = {"libtorch_cuda.so", "libcublasLt.so.13", "libcublasLt.so.12"};

// The first function that `object` lacks, or null.
const char* find_functions(void* object, lt::Functions& functions) {
#define FUSEDAMP_FIND(name)                                                                     \
  functions.name = reinterpret_cast<decltype(functions.name)>(dlsym(object, "cublasLt" #name)); \
  if (!functions.name) return "cublasLt" #name;
  FUSEDAMP_LT_FUNCTIONS(FUSEDAMP_FIND)
#undef FUSEDAMP_FIND
  return nullptr;
}

LtLibrary search() {
  LtLibrary library;
  for (const char* name : kNames) {
    library.missing += library.missing.empty() ? "" : ", ";
    library.missing += name;
    void* object = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (!object) {
      library.missing += " (not loaded)";
    } else if (const char* function = find_functions(object, library.functions)) {
      library.missing += std::string(" (without ") + function + ")";
    } else {
      const size_t v = library.functions.GetVersion();
      library.version = std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
      library.missing.clear();
      return library;
    }
  }
  library.missing = "cuBLASLt was not found in this process; looked for " + library.missing;
  return library;
}

}  // namespace

const LtLibrary& lt_library() {
  static const LtLibrary& library = *new LtLibrary(search());
  return library;
}

}  // namespace fusedamp::cuda
