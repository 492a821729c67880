#include "plan.h"

#include <cfloat>
#include <cstring>

namespace py = pybind11;

namespace fusedamp {
namespace {

struct Names {
  PyObject *params = PyUnicode_InternFromString("params"), *lr = PyUnicode_InternFromString("lr"),
           *main_grad = PyUnicode_InternFromString("main_grad");
};
const Names& names() {
  static const Names all;
  return all;
}

bool is(PyObject* text, PyObject* name) { return text == name || PyObject_RichCompareBool(text, name, Py_EQ) == 1; }

// True if a value is immutable.
bool is_fixed(PyObject* value) {
  if (PyTuple_Check(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
      if (!is_fixed(PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  return value == Py_None || PyLong_Check(value) || PyFloat_Check(value) || PyUnicode_Check(value);
}

bool is_rate(PyObject* value) {
  if (!PyFloat_CheckExact(value)) return false;
  const double rate = PyFloat_AS_DOUBLE(value);
  return rate >= 0.0 && rate <= static_cast<double>(FLT_MAX);
}

PyObject* list_of_params(PyObject* group) {
  PyObject* const params = PyDict_Check(group) ? PyDict_GetItemWithError(group, names().params) : nullptr;
  return params && PyList_Check(params) ? params : nullptr;
}

bool has_main_grad(PyObject* param) {
  PyObject* const found = PyObject_GetAttr(param, names().main_grad);
  if (!found) PyErr_Clear();
  Py_XDECREF(found);
  return found != nullptr;
}

}  // namespace

Plan::Plan(py::list groups, const std::vector<int64_t>& columns, const std::vector<std::pair<int64_t, int64_t>>& kinds,
           const std::vector<std::vector<int64_t>>& rates) {
  for (const py::handle group : groups) {
    PyObject* const params = list_of_params(group.ptr());
    if (!params) throw py::value_error("a group has no list of params");
    const auto n = static_cast<size_t>(PyList_GET_SIZE(params));
    for (size_t i = 0; i < n; ++i) {
      const size_t at = items_.size();
      if (at >= columns.size() || at >= kinds.size()) throw py::value_error("there are more params than columns");
      Item item = {PyList_GET_ITEM(params, i), {}, reinterpret_cast<int64_t*>(columns[at]), kinds[at].first,
                   kinds[at].second,           0};
      // A parameter without a gradient may be of any type, because it is not updated.
      if (!know(item.object, item.param)) {
        if (item.column || !is_plain_type(item.object)) throw py::value_error("a param is not plain");
        item.param.keys = 0;
      }
      items_.push_back(item);
    }
    Group known;
    known.params = n;
    for (const int64_t address : rates.at(groups_.size())) known.rates.push_back(reinterpret_cast<double*>(address));
    groups_.push_back(std::move(known));
    note_options(groups_.size() - 1, py::reinterpret_borrow<py::dict>(group));
  }
  seen_.resize(items_.size());
}

void Plan::note_options(size_t index, py::dict dict) {
  Group& group = groups_.at(index);
  group.options.clear();
  group.is_fixed = true;
  for (const auto& [name, value] : dict) {
    Option option = {py::reinterpret_borrow<py::object>(name), {}};
    if (!is(name.ptr(), names().params)) {  // params are compared separately
      option.value = py::reinterpret_borrow<py::object>(value);
      group.is_fixed = group.is_fixed && is_fixed(value.ptr());
    }
    group.options.push_back(std::move(option));
  }
}

bool Plan::has_same_options(Group& group, PyObject* dict) {
  if (!group.is_fixed || PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(group.options.size())) return false;
  PyObject *name, *value;
  auto known = group.options.begin();
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &value); ++known) {
    if (!is(name, known->name.ptr())) return false;
    if (!known->value || value == known->value.ptr()) continue;
    if (!is(name, names().lr) || !is_rate(value) || !is_rate(known->value.ptr())) return false;
    for (double* rate : group.rates) *rate = PyFloat_AS_DOUBLE(value);
    known->value = py::reinterpret_borrow<py::object>(value);
  }
  return true;
}

// False if the parameter or its gradient changed.
bool Plan::find(Item& item, bool versioned, Stamp* stamp) {
  Gradient found;
  if (!item.column) {  // it need not be plain before it has a gradient
    if (find_gradient(item.object, item.param, false, found) != Found::kNothing) return false;
    *stamp = {};
    return !has_main_grad(item.object);
  }
  if (!is_same(item.object, item.param) || find_gradient(item.object, item.param, versioned, found) != Found::kPlain ||
      found.fields.numel != item.numel || found.fields.dtype != item.dtype)
    return false;
  *item.column = found.fields.address;
  *stamp = {found.identity, found.version};
  return true;
}

py::object Plan::look(py::list groups, bool versioned) {
  if (static_cast<size_t>(PyList_GET_SIZE(groups.ptr())) != groups_.size()) return py::none();
  std::vector<size_t> changed;
  size_t at = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* const dict = PyList_GET_ITEM(groups.ptr(), g);
    PyObject* const params = list_of_params(dict);
    if (!params || static_cast<size_t>(PyList_GET_SIZE(params)) != groups_[g].params) return py::none();
    if (!has_same_options(groups_[g], dict)) changed.push_back(g);
    for (size_t i = 0; i < groups_[g].params; ++i, ++at) {
      if (i >= static_cast<size_t>(PyList_GET_SIZE(params)) || PyList_GET_ITEM(params, i) != items_[at].object ||
          !find(items_[at], versioned, &seen_[at]))
        return py::none();
    }
  }
  py::tuple found(changed.size());
  for (size_t i = 0; i < changed.size(); ++i) found[i] = changed[i];
  return found;
}

bool Plan::gradients_moved() {
  bool moved = false;
  for (Item& item : items_) {
    if (!item.column) continue;
    moved |= item.address != *item.column;
    item.address = *item.column;
  }
  return moved;
}

int64_t Plan::mark() {
  marked_ = seen_;
  return ++mark_;
}

bool Plan::is_as_marked(int64_t mark) const { return mark == mark_ && seen_ == marked_; }

}  // namespace fusedamp
