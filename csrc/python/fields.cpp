#include "fields.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "../include/fusedamp/rows.h"

namespace py = pybind11;

namespace fusedamp {
namespace {

constexpr Py_ssize_t kBytes = sizeof(Plain);  // of one tensor

// int64 [3, n], in the form that Python gets.
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

py::object read_fields(py::list tensors, bool stored) {
  const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
  if (n == 0) return py::none();
  const Columns fields(n);
  Reader reader;
  Plain found;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
    if (!reader.read(tensor, stored, found) || is_negated(tensor)) return py::none();
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

py::object grads_of(py::list params) {
  const Py_ssize_t n = PyList_GET_SIZE(params.ptr());
  Py_ssize_t missing = 0;
  py::list grads(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    if (!is_plain_type(param)) return py::none();
    py::object found = gradient(param);
    missing += found.is_none();
    PyList_SET_ITEM(grads.ptr(), i, found.release().ptr());
  }
  return py::make_tuple(grads, missing);
}

py::bytes versions(py::list tensors) {
  const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
  std::vector<int64_t> found(n);
  for (Py_ssize_t i = 0; i < n; ++i) found[i] = version(PyList_GET_ITEM(tensors.ptr(), i));
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
      if (part != Py_None) {  // of an encoded tensor; a plain one has no such attribute
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

// Begin and end address of each tensor.
template <class Visit>
void for_each_span(const Columns& fields, Visit visit) {
  for (Py_ssize_t i = 0; i < fields.n; ++i) {
    const int64_t begin = fields.words()[i], numel = fields.words()[fields.n + i];
    if (numel > 0) visit(begin, begin + numel * size_of(static_cast<DType>(fields.words()[2 * fields.n + i])));
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
