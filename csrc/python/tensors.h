// What one tensor is, read without Python's attributes: address, size, type, gradient, version counter.
#pragma once
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fusedamp {

// Call once: torch.Tensor, torch.nn.Parameter, the capsule torch.Tensor.__dlpack_c_exchange_api__, pairs of tensors and
// torch._neg_view of them, and leaves of which some have a gradient. False where its version of DLPack is not one that
// we know.
bool bind_tensors(pybind11::type tensor, pybind11::type parameter, pybind11::capsule exchange, pybind11::list negated,
                  pybind11::list leaves);

// Whether a plan reads tensors by torch's own C functions, five times as fast as by DLPack and Python's attributes.
// They are looked up by name at import and tried on tensors whose answers are known.
bool reads_directly();
void read_directly(bool wanted);  // for tests: where they were found

struct Plain {
  int64_t address, numel, dtype;  // dtype: its code in csrc/engine/dtype.h
  bool operator==(const Plain& other) const {
    return address == other.address && numel == other.numel && dtype == other.dtype;
  }
};
constexpr int64_t kSizes[] = {2, 2, 4, 8, 1, 1, 2};  // bytes of an element, by the code of its dtype

// Of exactly torch.Tensor or torch.nn.Parameter: subclasses may mean something else.
bool is_plain_type(PyObject* item);
bool is_negated(PyObject* tensor);
pybind11::object gradient(PyObject* tensor);  // its attribute .grad
int64_t version(PyObject* tensor);            // throws where it has none

// Reads plain tensors that are all on the same device.
class Reader {
 public:
  // False for what is not plain, or on another device than the first.
  bool read(PyObject* item, bool stored, Plain& fields);

 private:
  DLDevice device_ = {};
  bool started_ = false;
};

// A parameter as a plan knows it. `keys`: torch's dispatch keys, which tell subclasses and lazy views from plain
// tensors; 0 where they are not read.
struct KnownParam {
  Plain fields;
  uint64_t keys;
};
// What a parameter has as gradient. `identity` stands for the tensor while it lives.
struct Gradient {
  Plain fields;
  const void* identity;
  int64_t version;
};
enum class Found { kNothing, kPlain, kOther };

// False where it is not plain.
bool know(PyObject* param, KnownParam& known);
bool is_same(PyObject* param, const KnownParam& known);
// Its gradient, and with `versioned` the version counter; kOther where it is anything but a plain tensor.
Found find_gradient(PyObject* param, const KnownParam& known, bool versioned, Gradient& found);

}  // namespace fusedamp
