// Reads a tensor's fields without Python attributes: address, size, type, gradient, version counter.
#pragma once
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fusedamp {

// Call once with torch.Tensor, torch.nn.Parameter, the capsule torch.Tensor.__dlpack_c_exchange_api__, pairs of tensors
// and their torch._neg_view, and leaves, some with a gradient. False for an unknown version of DLPack.
bool bind_tensors(pybind11::type tensor, pybind11::type parameter, pybind11::capsule exchange, pybind11::list negated,
                  pybind11::list leaves);

// True if plans read tensors with torch's C functions, five times as fast as with DLPack and Python attributes. They
// are looked up by name at import and tested on known tensors.
bool reads_directly();
void read_directly(bool wanted);  // for tests, if they were found

struct Plain {
  int64_t address, numel, dtype;  // dtype: its code in csrc/include/fusedamp/rows.h
  bool operator==(const Plain& other) const {
    return address == other.address && numel == other.numel && dtype == other.dtype;
  }
};

// True for exactly torch.Tensor or torch.nn.Parameter; subclasses may behave differently.
bool is_plain_type(PyObject* item);
bool is_negated(PyObject* tensor);
pybind11::object gradient(PyObject* tensor);  // its attribute .grad
int64_t version(PyObject* tensor);            // throws if it has none

// Reads plain tensors that are all on the same device.
class Reader {
 public:
  // False if a tensor is not plain, or not on the device of the first.
  bool read(PyObject* item, bool stored, Plain& fields);

 private:
  DLDevice device_ = {};
  bool started_ = false;
};

// A parameter's fields in a plan. `keys`: torch's dispatch keys, which distinguish subclasses and lazy views from plain
// tensors; 0 if they are not read.
struct KnownParam {
  Plain fields;
  uint64_t keys;
};
// A parameter's gradient. `identity` identifies the tensor while it is alive.
struct Gradient {
  Plain fields;
  const void* identity;
  int64_t version;
};
enum class Found { kNothing, kPlain, kOther };

// False if it is not plain.
bool know(PyObject* param, KnownParam& known);
bool is_same(PyObject* param, const KnownParam& known);
// Reads its gradient, and with `versioned` the version counter; kOther if it is not a plain tensor.
Found find_gradient(PyObject* param, const KnownParam& known, bool versioned, Gradient& found);

}  // namespace fusedamp
