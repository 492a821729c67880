// cuBLASLt as torch has loaded it. It is never loaded here: a second copy would not know torch's handles.
#pragma once
#include <string>

#include "lt_abi.h"

namespace fusedamp::cuda {

struct LtLibrary {
  lt::Functions functions = {};
  std::string missing;  // why there are no functions; empty if there are
  std::string version;  // as 13.1.1
};

// Searched at the first call.
const LtLibrary& lt_library();

}  // namespace fusedamp::cuda
