#include "fields.h"

#include <ATen/dlpack.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
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

constexpr int64_t kSizes[] = {2, 2, 4, 8, 1, 1, 2};  // bytes of an element, by its code

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

// A lazy negation, which no field of a tensor shows: parts of conjugated complex numbers have it. It is one bit of a
// word in torch's own object; where that lies is found out on tensors whose answers are known, since asking takes 40
// ns.
class Negation {
 public:
  // `pairs`: of tensors, and the same negated.
  void learn(const py::list& pairs) {
    for (const py::handle pair : pairs) {
      const py::tuple two = py::reinterpret_borrow<py::tuple>(pair);
      if (!learn(two[0].ptr(), two[1].ptr())) {
        bit_ = 0;
        return;
      }
    }
  }
  bool of(PyObject* tensor) const {
    if (bit_) return (words_of(tensor)[word_] & bit_) != 0;
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethod(tensor, "is_neg", nullptr));
    if (!answer) throw py::error_already_set();
    return answer.ptr() != Py_False;
  }

 private:
  const uint64_t* words_of(PyObject* tensor) const {
    return reinterpret_cast<const uint64_t* const*>(tensor)[pointer_];
  }
  bool learn(PyObject* plain, PyObject* negated) {
    constexpr Py_ssize_t kPointers = 8, kWords = 24;  // within both objects
    if (bit_) {
      const uint64_t one = words_of(plain)[word_], other = words_of(negated)[word_];
      return (one ^ other) == bit_ && (other & bit_);
    }
    const auto address = py::handle(plain).attr("_cdata").cast<uint64_t>();
    for (pointer_ = 0; reinterpret_cast<const uint64_t*>(plain)[pointer_] != address;)
      if (++pointer_ == kPointers) return false;
    for (word_ = kWords; word_-- > 0;) {  // from the end: sizes and counts come before it
      const uint64_t other = words_of(negated)[word_], changed = words_of(plain)[word_] ^ other;
      if (changed && !(changed & (changed - 1)) && (other & changed)) {
        bit_ = changed;
        return true;
      }
    }
    return false;
  }

  Py_ssize_t pointer_ = 0, word_ = 0;
  uint64_t bit_ = 0;  // 0: not known
};
Negation negation;

// Reads plain tensors that are all on the same device.
class Reader {
 public:
  // False for what is not plain, or on another device than the first.
  bool read(PyObject* item, bool stored, Plain& fields) {
    if (!describe || !is_plain_type(item)) return false;
    DLTensor t;
    if (describe(item, &t) != 0) {  // sparse, meta ...
      PyErr_Clear();
      return false;
    }
    if (!started_) device_ = t.device;
    started_ = true;
    if (t.device.device_type != device_.device_type || t.device.device_id != device_.device_id) return false;
    if (device_.device_type != kDLCPU && device_.device_type != kDLCUDA) return false;
    fields = {static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset), contiguous_numel(t),
              dtype_code(t.dtype, stored)};
    return fields.numel >= 0 && fields.dtype >= 0 && (fields.numel == 0 || t.data);
  }

 private:
  DLDevice device_ = {};
  bool started_ = false;
};

// int64 [3, n], as Python gets it.
struct Columns {
  py::bytearray bytes;
  Py_ssize_t n;

  explicit Columns(Py_ssize_t n) : bytes(nullptr, 0), n(n) {
    if (PyByteArray_Resize(bytes.ptr(), n * kBytes) != 0) throw py::error_already_set();
  }
  explicit Columns(py::bytearray of) : bytes(of), n(PyByteArray_GET_SIZE(of.ptr()) / kBytes) {}

  int64_t* words() const { return reinterpret_cast<int64_t*>(PyByteArray_AS_STRING(bytes.ptr())); }
  void put(Py_ssize_t i, const Plain& tensor) const {
    words()[i] = tensor.address;
    words()[n + i] = tensor.numel;
    words()[2 * n + i] = tensor.dtype;
  }
  bool has(Py_ssize_t i, const Plain& tensor) const {
    return words()[i] == tensor.address && words()[n + i] == tensor.numel && words()[2 * n + i] == tensor.dtype;
  }
};

}  // namespace

bool bind_tensors(py::type tensor, py::type parameter, py::capsule exchange, py::list negated) {
  const auto* api = exchange.get_pointer<DLPackExchangeAPI>();
  if (api->header.version.major != DLPACK_MAJOR_VERSION) return false;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  describe = api->dltensor_from_py_object_no_sync;
  grad = Attribute(tensor_type, "grad");
  version = Attribute(tensor_type, "_version");
  negation.learn(negated);
  return describe != nullptr;
}

py::object read_fields(py::list tensors, bool stored) {
  const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
  if (n == 0) return py::none();
  const Columns fields(n);
  Reader reader;
  Plain found;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
    if (!reader.read(tensor, stored, found) || negation.of(tensor)) return py::none();
    fields.put(i, found);
  }
  return fields.bytes;
}

bool same_fields(py::list tensors, py::bytearray fields) {
  const Columns known(fields);
  if (PyList_GET_SIZE(tensors.ptr()) != known.n) return false;
  Reader reader;
  Plain found;
  for (Py_ssize_t i = 0; i < known.n; ++i)
    if (!reader.read(PyList_GET_ITEM(tensors.ptr(), i), true, found) || !known.has(i, found)) return false;
  return true;
}

py::object read_grads(py::list params, py::bytearray fields) {
  const Columns known(fields), grads(known.n);
  if (PyList_GET_SIZE(params.ptr()) != known.n) return py::none();
  Reader reader;
  Plain found;
  for (Py_ssize_t i = 0; i < known.n; ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    if (!reader.read(param, false, found) || !known.has(i, found)) return py::none();
    const py::object its = grad.of(param);
    if (!reader.read(its.ptr(), false, found) || negation.of(its.ptr())) return py::none();
    grads.put(i, found);
  }
  return grads.bytes;
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

py::object columns_of(py::list entries, py::list columns, py::list sizes) {
  const Py_ssize_t n = PyList_GET_SIZE(entries.ptr());
  if (PyList_GET_SIZE(sizes.ptr()) != n) return py::none();
  py::list found(n * PyList_GET_SIZE(columns.ptr()));
  Py_ssize_t at = 0;
  for (const py::handle column : columns) {
    PyObject *const name = PyTuple_GET_ITEM(column.ptr(), 0), *const part = PyTuple_GET_ITEM(column.ptr(), 1);
    for (Py_ssize_t i = 0; i < n; ++i, ++at) {
      PyObject* const entry = PyList_GET_ITEM(entries.ptr(), i);
      if (!PyDict_Check(entry) || PyDict_GET_SIZE(entry) != PyLong_AsSsize_t(PyList_GET_ITEM(sizes.ptr(), i)))
        return py::none();
      py::object value = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(entry, name));
      if (!value) return py::none();
      if (part != Py_None) {  // of a tensor that is encoded; a plain one has no such attribute
        value = py::reinterpret_steal<py::object>(PyObject_GetAttr(value.ptr(), part));
        if (!value) {
          PyErr_Clear();
          return py::none();
        }
      }
      PyList_SET_ITEM(found.ptr(), at, value.release().ptr());
    }
  }
  return found;
}

// Where each tensor begins and ends.
template <class Visit>
void for_each_span(const Columns& fields, Visit visit) {
  for (Py_ssize_t i = 0; i < fields.n; ++i) {
    const int64_t begin = fields.words()[i], numel = fields.words()[fields.n + i];
    if (numel > 0) visit(begin, begin + numel * kSizes[fields.words()[2 * fields.n + i]]);
  }
}

py::bytes spans(py::list lists) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const py::handle fields : lists)
    for_each_span(Columns(py::reinterpret_borrow<py::bytearray>(fields)),
                  [&](int64_t begin, int64_t end) { found.emplace_back(begin, end); });
  std::sort(found.begin(), found.end());
  return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof found[0]);
}

bool are_counts(py::bytearray fields, Py_ssize_t n) {
  const Columns known(fields);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const float count = *reinterpret_cast<const float*>(known.words()[i]);
    if (!(count >= 0.0f && count <= 0x1p62f && std::floor(count) == count)) return false;
  }
  return true;
}

bool touches(py::bytearray fields, py::bytes sorted) {
  using Span = std::pair<int64_t, int64_t>;
  const auto* const first = reinterpret_cast<const Span*>(PyBytes_AS_STRING(sorted.ptr()));
  const auto* const last = first + PyBytes_GET_SIZE(sorted.ptr()) / static_cast<Py_ssize_t>(sizeof(Span));
  bool found = false;
  for_each_span(Columns(fields), [&](int64_t begin, int64_t end) {
    const auto* const after = std::lower_bound(first, last, Span(end, 0));  // the first that begins at or after `end`
    found |= after != first && after[-1].second > begin;
  });
  return found;
}

}  // namespace fusedamp
