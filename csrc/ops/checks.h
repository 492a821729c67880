// The checks of an op's tensors, one property each. An error names the op, the index, what it got, what it wanted and
// the way out.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../engine/table.h"

namespace fusedamp {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// What an error calls a tensor: "grads[17]", or a name alone. Text is made only when something is wrong.
struct Name {
  const char* list;
  int64_t index = -1;
};
inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.list;
  return name.index < 0 ? out : out << "[" << name.index << "]";
}
inline Name at(const char* list, size_t i) { return {list, static_cast<int64_t>(i)}; }

template <class... Parts>
[[noreturn]] void fail(const std::string& op, const Parts&... parts) {
  std::ostringstream text;
  text << "[" << op << "] ";
  (text << ... << parts);
  STD_TORCH_CHECK(false, text.str());
  __builtin_unreachable();
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(dtype);
  }
}
inline std::string dtype_name(const Tensor& t) { return dtype_name(t.scalar_type()); }

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

template <class List>
std::string list_text(const List& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  if (a.is_cpu()) return b.is_cpu();
  return !b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void need_device(const std::string& op, const Name& name, const Tensor& t, const Name& like_name,
                        const Tensor& like) {
  if (!same_device(t, like))
    fail(op, name, " is on ", device_name(t), "; expected ", device_name(like), ", like ", like_name,
         ". Call the op once per device");
}

inline DType dtype_of(const std::string& op, const Name& name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    default:
      fail(op, name, " is ", dtype_name(t),
           "; expected float16, bfloat16, float32 or float64. Cast it (a complex tensor: ",
           "pass torch.view_as_real of it)");
  }
}

// Every element exactly once in a block of memory without gaps, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) by_stride.emplace_back(strides[d], sizes[d]);
  }
  std::sort(by_stride.begin(), by_stride.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && x[d] != y[d]) return false;
  return true;
}

// The address of a dense, strided tensor that has memory.
inline void* data_of(const std::string& op, const Name& name, const Tensor& t) {
  if (t.layout() != torch::headeronly::Layout::Strided)
    fail(op, name, " is sparse; expected a strided tensor. Pass its values, or .to_dense()");
  if (!is_dense(t))
    fail(
        op, name, " (shape ", list_text(t.sizes()), ", strides ", list_text(t.strides()),
        ") has gaps or overlaps in memory; expected a dense tensor in any order of dimensions. Pass .contiguous(), or ",
        "let fusedamp.optim handle it");
  void* data = t.data_ptr();
  if (!data && t.numel() > 0)
    fail(op, name, " (shape ", list_text(t.sizes()), ") has no memory; expected allocated storage. Was it freed?");
  return data;
}

// As data_of, with the shape and the order of memory of the parameter that it belongs to.
inline void* data_like(const std::string& op, const char* list, size_t i, const Tensor& t, const Tensor& param) {
  const Name name = at(list, i), like = at("params", i);
  need_device(op, name, t, like, param);
  const auto got = t.sizes(), wanted = param.sizes();
  bool same = got.size() == wanted.size();
  for (size_t d = 0; same && d < got.size(); ++d) same = got[d] == wanted[d];
  if (!same) fail(op, name, " has shape ", list_text(got), "; expected ", list_text(wanted), ", like ", like);
  void* data = data_of(op, name, t);
  if (!same_layout(t, param))
    fail(op, name, " has strides ", list_text(t.strides()), "; expected ", list_text(param.strides()), ", like ", like,
         " (shape ", list_text(wanted), "). Copy it into torch.empty_like(param), or let fusedamp.optim do so");
  return data;
}

inline void need_dtype(const std::string& op, const Name& name, const Tensor& t, ScalarType wanted, const Name& why,
                       const Tensor& like) {
  if (t.scalar_type() == wanted) return;
  fail(op, name, " is ", dtype_name(t), "; expected ", wanted == ScalarType::Double ? "float64" : "float32",
       ", because ", why, " is ", dtype_name(like));
}

inline void need_length(const std::string& op, const char* list, size_t got, size_t wanted, const char* why) {
  if (got != wanted) fail(op, list, " has ", got, " tensors; expected ", wanted, ", ", why);
}

template <class T>
T* one_element(const std::string& op, const Name& name, const OptionalTensor& scalar, const Tensor& like,
               ScalarType wanted, const char* wanted_name) {
  if (!scalar) return nullptr;
  need_device(op, name, *scalar, {"the tensors of the call"}, like);
  if (scalar->numel() != 1 || scalar->scalar_type() != wanted)
    fail(op, name, " is ", dtype_name(*scalar), " of shape ", list_text(scalar->sizes()), "; expected one ",
         wanted_name, " element");
  return static_cast<T*>(data_of(op, name, *scalar));
}

// Memory that an op touches: where it lies, and the names to tell if it should not lie there.
struct Span {
  const char *begin, *end;
  bool written;
  Name name;
  const Tensor* tensor;
};

inline void add_span(std::vector<Span>& spans, bool written, const Name& name, const Tensor& t, const void* data,
                     int64_t bytes) {
  const char* begin = static_cast<const char*>(data);
  if (t.numel() > 0) spans.push_back({begin, begin + t.numel() * bytes, written, name, &t});
}

inline void add_span(std::vector<Span>& spans, bool written, const Name& name, const Tensor& t) {
  add_span(spans, written, name, t, t.data_ptr(), static_cast<int64_t>(t.element_size()));
}

// Two of them that share memory, of which the first is written; null where there are none. What is written must have
// its memory to itself: two threads would write it, and a tensor given twice would be stepped twice. What is only read
// may be shared.
inline std::pair<const Span*, const Span*> find_shared(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span *read = nullptr, *write = nullptr;  // of those so far, the ones that end last
  for (const Span& span : spans) {
    const Span* other = write && span.begin < write->end                 ? write
                        : span.written && read && span.begin < read->end ? read
                                                                         : nullptr;
    if (other) return span.written ? std::pair{&span, other} : std::pair{other, &span};
    const Span*& last = span.written ? write : read;
    if (!last || last->end < span.end) last = &span;
  }
  return {nullptr, nullptr};
}

inline void need_own_memory(const std::string& op, std::vector<Span>& spans) {
  const auto [one, two] = find_shared(spans);
  if (one)
    fail(op, one->name, " (shape ", list_text(one->tensor->sizes()), ") shares memory with ", two->name,
         "; expected memory of its own for all that the op writes. Pass each tensor once, or a clone()");
}

}  // namespace fusedamp
