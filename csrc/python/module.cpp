// fusedamp._C: what this build is, and what the ops need to know of many tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "fields.h"
#include "pages.h"

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
  m.def("bind_tensors", &fusedamp::bind_tensors, "tensor"_a, "parameter"_a, "exchange"_a, "negated"_a,
        "Tell read_fields torch's types, the capsule of DLPack's exchange interface, and pairs of tensors and their\n"
        "lazy negations; False for an unknown version.");
  m.def("read_fields", &fusedamp::read_fields, "tensors"_a, "stored"_a = false,
        "A bytearray of int64 [3, n], the addresses, numels and dtype codes of n plain contiguous tensors with memory\n"
        "on one device, with `stored` also of small integers; None where there are none, or one is anything else.");
  m.def("same_fields", &fusedamp::same_fields, "tensors"_a, "fields"_a,
        "Whether read_fields would give these fields again.");
  m.def("read_grads", &fusedamp::read_grads, "params"_a, "fields"_a,
        "What read_fields gives for the gradients of params; None where it gives none, one has none, or read_fields\n"
        "would not give these fields for the params again.");
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
}
