// fusedamp._C: build information, and bulk access to tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "fields.h"
#include "pages.h"
#include "plan.h"

namespace fusedamp {
const char* origin();  // setup.py writes it
}

#define FUSEDAMP_TEXT_OF(value) #value
#define FUSEDAMP_TEXT(value) FUSEDAMP_TEXT_OF(value)
#if defined(__clang__)
#define FUSEDAMP_COMPILER \
  "clang++ " FUSEDAMP_TEXT(__clang_major__) "." FUSEDAMP_TEXT(__clang_minor__) "." FUSEDAMP_TEXT(__clang_patchlevel__)
#else
#define FUSEDAMP_COMPILER "g++ " __VERSION__
#endif

namespace py = pybind11;
using namespace pybind11::literals;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of fusedamp, and bulk access to tensors.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FUSEDAMP_VERSION;
        info["origin"] = fusedamp::origin();
        info["compiler"] = FUSEDAMP_COMPILER;
        info["torch"] = FUSEDAMP_TORCH;
        info["torch_abi_target"] = FUSEDAMP_TORCH_TARGET;
        info["nvcc"] = FUSEDAMP_NVCC;
        info["cuda_archs"] = std::vector<std::string>{FUSEDAMP_CUDA_ARCHS};
        info["cpu_targets"] = std::vector<std::string>{FUSEDAMP_CPU_TARGETS};
        return info;
      },
      "Version, origin (version and hash of the sources), compiler, torch version of the headers, oldest torch\n"
      "version that loads the ops, nvcc's release (empty in a CPU-only build), and the CUDA architectures and CPU\n"
      "instruction sets in the binaries.");
  m.def("bind_tensors", &fusedamp::bind_tensors, "tensor"_a, "parameter"_a, "exchange"_a, "negated"_a, "leaves"_a,
        "Set torch's types, the capsule of DLPack's exchange interface, pairs of tensors and their lazy\n"
        "negations, and leaves with and without gradients; False for an unknown version.");
  m.def("reads_directly", &fusedamp::reads_directly, "True if plans read tensors with torch's C functions.");
  m.def("read_directly", &fusedamp::read_directly, "wanted"_a, "Switch torch's C functions off or on, for tests.");
  m.def(
      "read_fields", &fusedamp::read_fields, "tensors"_a, "stored"_a = false,
      "Read the addresses, numels and dtype codes of n plain contiguous tensors with memory on one device as a\n"
      "bytearray of int64 [3, n]; with `stored` also of small integers. None if empty or a tensor is of another kind.");
  m.def("same_fields", &fusedamp::same_fields, "tensors"_a, "fields"_a,
        "True if read_fields would return equal fields.");
  m.def("grads_of", &fusedamp::grads_of, "params"_a,
        "Return the list of .grad and the number that are None; None if one is not a plain tensor or parameter.");
  m.def("versions", &fusedamp::versions, "tensors"_a, "Return their version counters as int64, in bytes.");
  m.def("same_items", &fusedamp::same_items, "lists"_a, "items"_a,
        "True if the concatenated lists have the same objects as a list.");
  m.def("advise_huge_pages", &fusedamp::advise_huge_pages, "address"_a, "bytes"_a,
        "Ask the system for huge pages in memory that was not written yet.");
  m.def(
      "columns_of", &fusedamp::columns_of, "entries"_a, "columns"_a, "sizes"_a,
      "Return the values of dicts for each of some keys, or an attribute of them, key by key; None if one is missing\n"
      "or a dict has another number of items.");
  m.def("spans", &fusedamp::spans, "lists"_a, "Return the memory ranges of the tensors of lists of fields, sorted.");
  m.def("are_counts", &fusedamp::are_counts, "fields"_a, "n"_a,
        "True if the first n tensors (FP32, one element, on the host) are whole numbers from 0 to 2^62.");
  m.def("touches", &fusedamp::touches, "fields"_a, "spans"_a,
        "True if a tensor of these fields shares memory with one of these spans.");
  py::class_<fusedamp::Plan>(m, "Plan", "Snapshot of an optimizer at a step: see csrc/python/plan.h.")
      .def(py::init<py::list, const std::vector<int64_t>&, const std::vector<std::pair<int64_t, int64_t>>&,
                    const std::vector<std::vector<int64_t>>&>(),
           "groups"_a, "columns"_a, "kinds"_a, "rates"_a)
      .def("look", &fusedamp::Plan::look, "groups"_a, "versioned"_a = false,
           "Return the groups whose options changed, or None if anything but gradients and options changed.")
      .def("note_options", &fusedamp::Plan::note_options, "index"_a, "group"_a,
           "Record the current options of a group.")
      .def("gradients_moved", &fusedamp::Plan::gradients_moved, "True if gradients moved since the last call.")
      .def("mark", &fusedamp::Plan::mark, "Record the gradients of the last versioned look(); returns its number.")
      .def("is_as_marked", &fusedamp::Plan::is_as_marked, "mark"_a,
           "True if the last versioned look() found these gradients unmodified.");
}
