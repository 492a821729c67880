#include "fields.h"

#include <ATen/dlpack.h>

#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace fusedamp {
namespace {

// An attribute that torch computes in C, read without looking its name up.
struct Attribute {
  PyObject* name;
  getter get;
  void* closure;

  Attribute() = default;
  Attribute(PyTypeObject* type, const char* text) : name(PyUnicode_InternFromString(text)), get(), closure() {
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name));
    if (!found) throw py::error_already_set();
    if (!PyObject_TypeCheck(found.ptr(), &PyGetSetDescr_Type)) return;
    const PyGetSetDef* getset = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;  // lives with the type
    get = getset->get;
    closure = getset->closure;
  }
  py::object of(PyObject* tensor) const {
    auto value = py::reinterpret_steal<py::object>(get ? get(tensor, closure) : PyObject_GetAttr(tensor, name));
    if (!value) throw py::error_already_set();
    return value;
  }
};

// Borrowed for as long as the process lives: torch's own types and table.
PyTypeObject *tensor_type, *parameter_type;
DLPackDLTensorFromPyObjectNoSync describe;
Attribute grad, version;

bool is_plain_type(PyObject* item) { return Py_TYPE(item) == tensor_type || Py_TYPE(item) == parameter_type; }

struct Plain {
  int64_t address, numel, dtype;
};
constexpr Py_ssize_t kBytes = sizeof(Plain);  // of one tensor

// csrc/engine/dtype.h; integers only where they store something.
int64_t dtype_code(const DLDataType& dtype, bool stored) {
  if (dtype.lanes != 1) return -1;
  if (stored && dtype.code == kDLInt) return dtype.bits == 8 ? 4 : dtype.bits == 16 ? 6 : -1;
  if (stored && dtype.code == kDLUInt) return dtype.bits == 8 ? 5 : -1;
  if (dtype.code == kDLBfloat) return dtype.bits == 16 ? 1 : -1;
  if (dtype.code != kDLFloat) return -1;
  return dtype.bits == 16 ? 0 : dtype.bits == 32 ? 2 : dtype.bits == 64 ? 3 : -1;
}

// How many elements, or -1 where they don't lie one after the other.
int64_t contiguous_numel(const DLTensor& t) {
  int64_t numel = 1;
  for (int32_t d = 0; d < t.ndim; ++d) numel *= t.shape[d];
  if (numel == 0 || !t.strides) return numel;
  int64_t expected = 1;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    if (t.strides[d] != expected) return -1;
    expected *= t.shape[d];
  }
  return numel;
}

// A lazy negation, which no field of a tensor shows. Only parts of complex numbers have it; contiguous if single.
bool is_negated(PyObject* tensor) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, is_neg));
  if (!answer) throw py::error_already_set();
  return answer.ptr() != Py_False;
}

// Calls visit(i, fields) for every tensor until it answers false, or one is not plain, or on another device than the
// first. False then.
template <class Visit>
bool for_each_plain(const py::list& tensors, bool stored, Visit visit) {
  DLDevice device = {};
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    PyObject* item = PyList_GET_ITEM(tensors.ptr(), i);
    if (!is_plain_type(item)) return false;
    DLTensor t;
    if (describe(item, &t) != 0) {  // sparse, meta ...
      PyErr_Clear();
      return false;
    }
    if (i == 0) device = t.device;
    if (t.device.device_type != device.device_type || t.device.device_id != device.device_id) return false;
    if (device.device_type != kDLCPU && device.device_type != kDLCUDA) return false;
    const Plain fields = {static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset),
                          contiguous_numel(t), dtype_code(t.dtype, stored)};
    if (fields.numel < 0 || fields.dtype < 0 || (fields.numel > 0 && !t.data)) return false;
    if (!visit(i, fields)) return false;
  }
  return true;
}

}  // namespace

bool bind_tensors(py::type tensor, py::type parameter, py::capsule exchange) {
  const auto* api = exchange.get_pointer<DLPackExchangeAPI>();
  if (api->header.version.major != DLPACK_MAJOR_VERSION) return false;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  describe = api->dltensor_from_py_object_no_sync;
  grad = Attribute(tensor_type, "grad");
  version = Attribute(tensor_type, "_version");
  return describe != nullptr;
}

py::object read_fields(py::list tensors, bool stored) {
  const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
  if (n == 0 || !describe) return py::none();
  py::bytearray fields(nullptr, 0);
  if (PyByteArray_Resize(fields.ptr(), n * kBytes) != 0) throw py::error_already_set();
  auto* words = reinterpret_cast<int64_t*>(PyByteArray_AS_STRING(fields.ptr()));
  const bool all = for_each_plain(tensors, stored, [&](Py_ssize_t i, const Plain& tensor) {
    words[i] = tensor.address;
    words[n + i] = tensor.numel;
    words[2 * n + i] = tensor.dtype;
    return tensor.numel != 1 || !is_negated(PyList_GET_ITEM(tensors.ptr(), i));
  });
  return all ? py::object(fields) : py::none();
}

bool same_fields(py::list tensors, py::bytearray fields) {
  const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
  if (PyByteArray_GET_SIZE(fields.ptr()) != n * kBytes) return false;
  const auto* words = reinterpret_cast<const int64_t*>(PyByteArray_AS_STRING(fields.ptr()));
  return for_each_plain(tensors, true, [&](Py_ssize_t i, const Plain& tensor) {
    return words[i] == tensor.address && words[n + i] == tensor.numel && words[2 * n + i] == tensor.dtype;
  });
}

py::object grads_of(py::list params) {
  const Py_ssize_t n = PyList_GET_SIZE(params.ptr());
  Py_ssize_t missing = 0;
  py::list grads(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    if (!describe || !is_plain_type(param)) return py::none();
    py::object found = grad.of(param);
    missing += found.is_none();
    PyList_SET_ITEM(grads.ptr(), i, found.release().ptr());
  }
  return py::make_tuple(grads, missing);
}

py::bytes versions(py::list tensors) {
  const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
  std::vector<int64_t> found(n);
  for (Py_ssize_t i = 0; i < n; ++i) found[i] = version.of(PyList_GET_ITEM(tensors.ptr(), i)).cast<int64_t>();
  return py::bytes(reinterpret_cast<const char*>(found.data()), n * sizeof(int64_t));
}

bool same_items(py::list lists, py::list items) {
  const Py_ssize_t wanted = PyList_GET_SIZE(items.ptr());
  Py_ssize_t seen = 0;
  for (const py::handle list : lists) {
    if (!PyList_Check(list.ptr())) return false;
    const Py_ssize_t n = PyList_GET_SIZE(list.ptr());
    if (n > wanted - seen) return false;
    for (Py_ssize_t i = 0; i < n; ++i, ++seen)
      if (PyList_GET_ITEM(list.ptr(), i) != PyList_GET_ITEM(items.ptr(), seen)) return false;
  }
  return seen == wanted;
}

bool same_values(py::list dicts, py::list values) {
  const Py_ssize_t wanted = PyList_GET_SIZE(values.ptr());
  Py_ssize_t seen = 0;
  for (const py::handle dict : dicts) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value); ++seen)
      if (seen >= wanted || PyList_GET_ITEM(values.ptr(), seen) != value) return false;
  }
  return seen == wanted;
}

}  // namespace fusedamp
