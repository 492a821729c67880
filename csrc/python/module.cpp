// fusedamp._C: what this build is, and what the ops need to know of many tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "fields.h"
#include "pages.h"
#include "plan.h"

namespace py = pybind11;
using namespace pybind11::literals;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of fusedamp, and what of its Python must be fast.";
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
  m.def("bind_tensors", &fusedamp::bind_tensors, "tensor"_a, "parameter"_a, "exchange"_a, "negated"_a, "leaves"_a,
        "Tell read_fields torch's types, the capsule of DLPack's exchange interface, pairs of tensors and their lazy\n"
        "negations, and leaves with and without gradients; False for an unknown version.");
  m.def("reads_directly", &fusedamp::reads_directly, "Whether plans read tensors by torch's own C functions.");
  m.def("read_directly", &fusedamp::read_directly, "wanted"_a, "Switch that off or on again, for tests.");
  m.def("read_fields", &fusedamp::read_fields, "tensors"_a, "stored"_a = false,
        "A bytearray of int64 [3, n], the addresses, numels and dtype codes of n plain contiguous tensors with memory\n"
        "on one device, with `stored` also of small integers; None where there are none, or one is anything else.");
  m.def("same_fields", &fusedamp::same_fields, "tensors"_a, "fields"_a,
        "Whether read_fields would give these fields again.");
  m.def("grads_of", &fusedamp::grads_of, "params"_a,
        "The list of each one's grad, and how many of them are None; None where one is no plain tensor or parameter.");
  m.def("versions", &fusedamp::versions, "tensors"_a, "Their version counters as int64, in bytes.");
  m.def("same_items", &fusedamp::same_items, "lists"_a, "items"_a,
        "Whether the items of all lists, one after the other, are the very objects in a list.");
  m.def("advise_huge_pages", &fusedamp::advise_huge_pages, "address"_a, "bytes"_a,
        "Ask the system for huge pages in memory that nobody has written yet.");
  m.def("columns_of", &fusedamp::columns_of, "entries"_a, "columns"_a, "sizes"_a,
        "What dicts have under each of some keys, or an attribute of it, key by key; None where one is missing or a\n"
        "dict has another number of items.");
  m.def("spans", &fusedamp::spans, "lists"_a, "Where the tensors of lists of fields begin and end in memory, sorted.");
  m.def("are_counts", &fusedamp::are_counts, "fields"_a, "n"_a,
        "Whether the first n tensors, FP32 of one element on the host, hold whole numbers from 0 to 2^62.");
  m.def("touches", &fusedamp::touches, "fields"_a, "spans"_a,
        "Whether a tensor of these fields shares memory with one of these spans.");
  py::class_<fusedamp::Plan>(m, "Plan", "What a step saw of an optimizer: see csrc/python/plan.h.")
      .def(py::init<py::list, const std::vector<int64_t>&, const std::vector<std::pair<int64_t, int64_t>>&,
                    const std::vector<std::vector<int64_t>>&>(),
           "groups"_a, "columns"_a, "kinds"_a, "rates"_a)
      .def("look", &fusedamp::Plan::look, "groups"_a, "versioned"_a = false,
           "The groups whose options changed, or None where more than gradients and options did.")
      .def("note_options", &fusedamp::Plan::note_options, "index"_a, "group"_a, "Note the present options of a group.")
      .def("gradients_moved", &fusedamp::Plan::gradients_moved, "Whether gradients moved since this was asked last.")
      .def("mark", &fusedamp::Plan::mark, "Remember the gradients of the last versioned look; a number for it.")
      .def("is_as_marked", &fusedamp::Plan::is_as_marked, "mark"_a,
           "Whether the last versioned look saw these gradients, unwritten.");
}
