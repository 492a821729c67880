// fusedamp._C: what this build is. It touches no tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of fusedamp.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FUSEDAMP_VERSION;
        info["compiler"] = "g++ " __VERSION__;
        info["torch"] = FUSEDAMP_TORCH;
        info["torch_abi_target"] = FUSEDAMP_TORCH_TARGET;
        info["nvcc"] = FUSEDAMP_NVCC;
        info["cuda_archs"] = std::vector<std::string>{FUSEDAMP_CUDA_ARCHS};
        info["cpu_targets"] = std::vector<std::string>{FUSEDAMP_CPU_TARGETS};
        return info;
      },
      "Version, compiler, the torch whose headers were used, the oldest torch that the ops load under, nvcc's release\n"
      "(empty in a CPU-only build), and the CUDA architectures and CPU instruction sets that are in the machine code.");
}
