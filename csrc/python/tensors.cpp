#include "tensors.h"

#include <dlfcn.h>
#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <exception>

#include "../include/fusedamp/rows.h"

namespace py = pybind11;

namespace fusedamp {
namespace {

// An attribute that torch implements in C, read without a name lookup.
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

// Borrowed for the lifetime of the process: torch's types and table.
PyTypeObject *tensor_type, *parameter_type;
DLPackDLTensorFromPyObjectNoSync describe;
Attribute grad_attribute, version_attribute;

// A DType, or -1; integers only as storage types.
int64_t dtype_code(const DLDataType& dtype, bool stored) {
  const auto code = [](bool known, DType t) { return known ? static_cast<int64_t>(t) : -1; };
  if (dtype.lanes != 1) return -1;
  if (stored && dtype.code == kDLInt)
    return dtype.bits == 8 ? code(true, DType::i8) : code(dtype.bits == 16, DType::i16);
  if (stored && dtype.code == kDLUInt) return code(dtype.bits == 8, DType::u8);
  if (dtype.code == kDLBfloat) return code(dtype.bits == 16, DType::bf16);
  if (dtype.code != kDLFloat) return -1;
  if (dtype.bits == 16) return code(true, DType::f16);
  return dtype.bits == 32 ? code(true, DType::f32) : code(dtype.bits == 64, DType::f64);
}

// Number of elements, or -1 if they are not contiguous.
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

// Lazy negation (of parts of conjugated complex tensors), which no field of a tensor shows. It is one bit of a word in
// torch's C++ object; its position is determined with known tensors, because calling torch takes 40 ns.
class Negation {
 public:
  // `pairs`: of tensors, and the same negated. A bit is taken only if it tells all of them apart: words that hold
  // counts or addresses may differ by one bit, too.
  void learn(const py::list& pairs) {
    bit_ = 0;
    constexpr Py_ssize_t kPointers = 8, kWords = 24;
    if (pairs.empty()) return;
    const auto differs = [&](Py_ssize_t pointer) {
      for (const py::handle pair : pairs)
        for (const py::handle tensor : py::reinterpret_borrow<py::tuple>(pair))
          if (reinterpret_cast<const uint64_t*>(tensor.ptr())[pointer] != tensor.attr("_cdata").cast<uint64_t>())
            return true;
      return false;
    };
    for (pointer_ = 0; differs(pointer_);)
      if (++pointer_ == kPointers) return;
    word_ = kWords;
    for (const py::handle pair : pairs)
      for (const py::handle tensor : py::reinterpret_borrow<py::tuple>(pair))
        word_ = std::min(word_, words_within(object_of(tensor.ptr())));
    while (word_-- > 0)  // from the end: sizes and counts come first
      if ((bit_ = common_bit(pairs))) return;
  }
  bool of(PyObject* tensor) const {
    if (bit_) return (keys(object_of(tensor)) & bit_) != 0;
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethod(tensor, "is_neg", nullptr));
    if (!answer) throw py::error_already_set();
    return answer.ptr() != Py_False;
  }
  bool is_known() const { return bit_ != 0; }
  // torch's C++ object of a Python tensor, and its dispatch keys, one bit of which is the negation.
  const void* object_of(PyObject* tensor) const { return reinterpret_cast<const void* const*>(tensor)[pointer_]; }
  uint64_t keys(const void* object) const { return static_cast<const uint64_t*>(object)[word_]; }

 private:
  // torch allocates its objects with `new`, which is malloc's memory.
  static Py_ssize_t words_within(const void* object) {
    return static_cast<Py_ssize_t>(malloc_usable_size(const_cast<void*>(object)) / sizeof(uint64_t));
  }
  const uint64_t* words_of(PyObject* tensor) const { return static_cast<const uint64_t*>(object_of(tensor)); }
  // The one bit of the word that is set in all negated tensors and in no other; 0 if there is none.
  uint64_t common_bit(const py::list& pairs) const {
    uint64_t bit = 0;
    for (const py::handle pair : pairs) {
      const py::tuple two = py::reinterpret_borrow<py::tuple>(pair);
      const uint64_t other = words_of(two[1].ptr())[word_], changed = words_of(two[0].ptr())[word_] ^ other;
      if (!changed || changed & (changed - 1) || !(other & changed) || (bit && bit != changed)) return 0;
      bit = changed;
    }
    return bit;
  }

  Py_ssize_t pointer_ = 0, word_ = 0;
  uint64_t bit_ = 0;  // 0: not known
};
Negation negation;

// Functions of torch's libraries, by name: C functions of its stable ABI, and two C++ member functions without an
// equivalent there. A tensor in C++ is one pointer to torch's object.
class Direct {
 public:
  bool enabled = false;

  // `leaves`: some have a gradient. True if all functions exist and agree with DLPack and Python.
  bool learn(const py::list& leaves) {
    return find(grad_, "libc10.so", "_ZNK3c1010TensorImpl4gradEv") &&
           find(version_, "libtorch_cpu.so", "_ZNK2at10TensorBase8_versionEv") &&
           find(data_ptr_, "libtorch_cpu.so", "aoti_torch_get_data_ptr") &&
           find(numel_, "libtorch_cpu.so", "aoti_torch_get_numel") &&
           find(dtype_, "libtorch_cpu.so", "aoti_torch_get_dtype") &&
           find(is_contiguous_, "libtorch_cpu.so", "aoti_torch_is_contiguous") && negation.is_known() && try_on(leaves);
  }
  bool read(const void* const* tensor, Plain& fields) const {
    void* data;
    int32_t type;
    bool contiguous;
    if (data_ptr_(tensor, &data) || numel_(tensor, &fields.numel) || dtype_(tensor, &type) ||
        is_contiguous_(tensor, &contiguous))
      return false;
    fields.address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
    fields.dtype = type == 5 ? 0 : type == 15 ? 1 : type == 6 ? 2 : type == 7 ? 3 : -1;  // c10::ScalarType
    return contiguous && fields.dtype >= 0 && (data || fields.numel == 0);
  }
  const void* const* gradient(const void* param) const { return grad_(param); }
  bool is_nothing(const void* object) const { return object == nothing_; }
  int64_t version(const void* const* tensor) const { return version_(tensor); }

 private:
  template <class Function>
  static bool find(Function& function, const char* library, const char* name) {
    void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);  // torch has loaded it, or it is not there
    if (!loaded) return false;
    function = reinterpret_cast<Function>(dlsym(loaded, name));
    dlclose(loaded);
    return function != nullptr;
  }
  bool try_on(const py::list& leaves) {
    int with = 0, without = 0;
    for (const py::handle leaf : leaves) {
      const void* const object = negation.object_of(leaf.ptr());
      const void* const* const found = grad_(object);
      const py::object known = grad_attribute.of(leaf.ptr());
      Plain by_name, by_dlpack;
      if (!Reader().read(leaf.ptr(), false, by_dlpack) || !read(&object, by_name) || !(by_name == by_dlpack))
        return false;
      if (known.is_none()) {
        if (without++ && nothing_ != *found) return false;
        nothing_ = *found;
      } else {
        ++with;
        if (*found != negation.object_of(known.ptr()) || !Reader().read(known.ptr(), false, by_dlpack) ||
            !read(found, by_name) || !(by_name == by_dlpack) ||
            version_(found) != version_attribute.of(known.ptr()).cast<int64_t>())
          return false;
      }
    }
    return with > 1 && without > 1;
  }

  const void* const* (*grad_)(const void*);
  int64_t (*version_)(const void* const*);
  int32_t (*data_ptr_)(const void* const*, void**);
  int32_t (*numel_)(const void* const*, int64_t*);
  int32_t (*dtype_)(const void* const*, int32_t*);
  int32_t (*is_contiguous_)(const void* const*, bool*);
  const void* nothing_ = nullptr;  // represents a missing gradient
};
Direct direct;
bool can_read_directly = false;

}  // namespace

bool bind_tensors(py::type tensor, py::type parameter, py::capsule exchange, py::list negated, py::list leaves) {
  const auto* api = exchange.get_pointer<DLPackExchangeAPI>();
  if (api->header.version.major != DLPACK_MAJOR_VERSION) return false;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  describe = api->dltensor_from_py_object_no_sync;
  if (!describe) return false;
  grad_attribute = Attribute(tensor_type, "grad");
  version_attribute = Attribute(tensor_type, "_version");
  negation.learn(negated);
  can_read_directly = direct.enabled = direct.learn(leaves);
  return true;
}

bool reads_directly() { return direct.enabled; }
void read_directly(bool wanted) { direct.enabled = wanted && can_read_directly; }

bool is_plain_type(PyObject* item) { return Py_TYPE(item) == tensor_type || Py_TYPE(item) == parameter_type; }
bool is_negated(PyObject* tensor) { return negation.of(tensor); }
py::object gradient(PyObject* tensor) { return grad_attribute.of(tensor); }
int64_t version(PyObject* tensor) { return version_attribute.of(tensor).cast<int64_t>(); }

bool Reader::read(PyObject* item, bool stored, Plain& fields) {
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

bool know(PyObject* param, KnownParam& known) {
  if (!Reader().read(param, false, known.fields) || is_negated(param)) return false;
  known.keys = negation.is_known() ? negation.keys(negation.object_of(param)) : 0;
  return true;
}

bool is_same(PyObject* param, const KnownParam& known) {
  Plain now;
  if (!direct.enabled) return Reader().read(param, false, now) && now == known.fields;
  if (!is_plain_type(param)) return false;
  const void* const object = negation.object_of(param);
  return negation.keys(object) == known.keys && direct.read(&object, now) && now == known.fields;
}

Found find_gradient(PyObject* param, const KnownParam& known, bool versioned, Gradient& found) {
  if (!direct.enabled) {
    const py::object its = gradient(param);
    if (its.is_none()) return Found::kNothing;
    Reader reader;  // for both, because they must be on one device
    Plain its_param;
    if (!reader.read(param, false, its_param) || !reader.read(its.ptr(), false, found.fields) || is_negated(its.ptr()))
      return Found::kOther;
    found.identity = its.ptr();
    try {
      found.version = versioned ? version(its.ptr()) : 0;
    } catch (const py::error_already_set&) {  // made in inference mode
      return Found::kOther;
    }
    return Found::kPlain;
  }
  const void* const* const its = direct.gradient(negation.object_of(param));
  if (direct.is_nothing(*its)) return Found::kNothing;
  if (negation.keys(*its) != known.keys || !direct.read(its, found.fields)) return Found::kOther;
  found.identity = *its;
  try {
    found.version = versioned ? direct.version(its) : 0;
  } catch (const std::exception&) {  // made in inference mode
    return Found::kOther;
  }
  return Found::kPlain;
}

}  // namespace fusedamp
