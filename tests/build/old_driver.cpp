// Prints what the first call of CUDA says, as the ops do.
#include "../../csrc/engine/cuda/old_driver.h"

#include <cstdio>

int main() {
  const cudaError_t error = cudaSetDevice(0);
  std::printf("%s%s\n", cudaGetErrorString(error), fusedamp::cuda::old_driver().c_str());
}
