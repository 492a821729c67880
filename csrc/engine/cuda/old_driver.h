// What a CUDA error does not say: the driver may be older than the CUDA runtime in this object.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

namespace fusedamp::cuda {

inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A sentence with both versions and the way out, to append to an error; empty if the driver is not older.
inline std::string old_driver() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess) return "";
  if (driver == 0 || driver >= runtime) return "";
  return ". The driver supports CUDA " + version_text(driver) + ", and fusedamp was built with CUDA " +
         version_text(runtime) + ": update the driver, or build fusedamp with CUDA " + version_text(driver) +
         " or earlier.";
}

}  // namespace fusedamp::cuda
