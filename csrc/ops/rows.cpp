#include "rows.h"

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <sstream>
#include <utility>

namespace fusedamp {
namespace {

using torch::headeronly::ScalarType;

// What an error calls a tensor: "grads[17]", or a name alone. Text is made only when something is wrong.
struct Name {
  const char* list;
  int64_t index = -1;
};
std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.list;
  return name.index < 0 ? out : out << "[" << name.index << "]";
}
Name at(const char* list, size_t i) { return {list, static_cast<int64_t>(i)}; }

template <class... Parts>
[[noreturn]] void fail(const std::string& op, const Parts&... parts) {
  std::ostringstream text;
  text << "[" << op << "] ";
  (text << ... << parts);
  STD_TORCH_CHECK(false, text.str());
  __builtin_unreachable();
}

std::string dtype_name(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(t.scalar_type());
  }
}

std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

template <class List>
std::string list_text(const List& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

bool same_device(const Tensor& a, const Tensor& b) {
  if (a.is_cpu()) return b.is_cpu();
  return !b.is_cpu() && a.get_device_index() == b.get_device_index();
}

void need_device(const std::string& op, const Name& name, const Tensor& t, const Name& like_name, const Tensor& like) {
  if (!same_device(t, like))
    fail(op, name, " is on ", device_name(t), "; expected ", device_name(like), ", like ", like_name,
         ". Call the op once per device");
}

DType dtype_of(const std::string& op, const Name& name, const Tensor& t) {
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
bool is_dense(const Tensor& t) {
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

bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && x[d] != y[d]) return false;
  return true;
}

// The address of a dense, strided tensor that has memory.
void* data_of(const std::string& op, const Name& name, const Tensor& t) {
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
void* data_like(const std::string& op, const char* list, size_t i, const Tensor& t, const Tensor& param) {
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

void need_dtype(const std::string& op, const Name& name, const Tensor& t, ScalarType wanted, const Name& why,
                const Tensor& like) {
  if (t.scalar_type() == wanted) return;
  fail(op, name, " is ", dtype_name(t), "; expected ", wanted == ScalarType::Double ? "float64" : "float32",
       ", because ", why, " is ", dtype_name(like));
}

void need_length(const std::string& op, const char* list, size_t got, size_t wanted, const char* why) {
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

void add_span(std::vector<Span>& spans, bool written, const Name& name, const Tensor& t, const void* data,
              int64_t bytes) {
  const char* begin = static_cast<const char*>(data);
  if (t.numel() > 0) spans.push_back({begin, begin + t.numel() * bytes, written, name, &t});
}

// What is written must have its memory to itself: two threads would write it, and a tensor given twice would be
// stepped twice. What is only read may be shared.
void need_own_memory(const std::string& op, std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span *read = nullptr, *write = nullptr;  // of those so far, the ones that end last
  for (const Span& span : spans) {
    const Span* other = write && span.begin < write->end                 ? write
                        : span.written && read && span.begin < read->end ? read
                                                                         : nullptr;
    if (other) {
      const Span &one = span.written ? span : *other, &two = span.written ? *other : span;
      fail(op, one.name, " (shape ", list_text(one.tensor->sizes()), ") shares memory with ", two.name,
           "; expected memory of its own for all that the op writes. Pass each tensor once, or a clone()");
    }
    const Span*& last = span.written ? write : read;
    if (!last || last->end < span.end) last = &span;
  }
}

int64_t packed_count(const std::string& op, const Tensor& packed, int64_t columns) {
  if (packed.scalar_type() != ScalarType::Long || !packed.is_cpu() || !packed.is_contiguous() ||
      packed.numel() % columns != 0)
    fail(op, "rows are ", dtype_name(packed), " of shape ", list_text(packed.sizes()), " on ", device_name(packed),
         "; expected contiguous int64 [n, ", columns, "] on the cpu");
  return packed.numel() / columns;
}

}  // namespace

std::vector<StepRow> step_rows(const std::string& op, const StepLists& lists) {
  const size_t n = lists.params.size();
  need_length(op, "grads", lists.grads.size(), n, "one per param");
  need_length(op, "steps", lists.steps.size(), n, "one per param");
  if (!lists.masters.empty()) need_length(op, "masters", lists.masters.size(), n, "one per param, or none at all");

  std::vector<StepRow> rows(n);
  std::vector<Span> spans;
  spans.reserve(n * 7);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = lists.params[i];
    StepRow& row = rows[i];
    const Name name = at("params", i);
    need_device(op, name, param, at("params", 0), lists.params[0]);
    row.param_dtype = dtype_of(op, name, param);
    row.param = data_of(op, name, param);
    row.numel = param.numel();

    row.grad_dtype = dtype_of(op, at("grads", i), lists.grads[i]);
    row.grad = data_like(op, "grads", i, lists.grads[i], param);
    if (row.grad_dtype == DType::f64 && row.param_dtype != DType::f64)
      fail(op, at("grads", i), " is float64; expected at most float32, because ", name, " is ", dtype_name(param),
           ". Cast the gradient");

    row.master = nullptr;
    if (!lists.masters.empty()) {
      if (!is_16bit(row.param_dtype))
        fail(op, name, " is ", dtype_name(param),
             " and has a master; expected float16 or bfloat16. Step it in a call of ", "its own, without masters");
      need_dtype(op, at("masters", i), lists.masters[i], ScalarType::Float, name, param);
      row.master = static_cast<float*>(data_like(op, "masters", i, lists.masters[i], param));
    }
    const bool wide = row.param_dtype == DType::f64;
    for (size_t j = 0; j < lists.states.size() / n; ++j) {
      const Tensor& state = lists.states[j * n + i];
      need_dtype(op, at("states", j * n + i), state, wide ? ScalarType::Double : ScalarType::Float, name, param);
      row.states[j] = data_like(op, "states", j * n + i, state, param);
    }
    row.step = one_element<float>(op, at("steps", i), lists.steps[i], param, ScalarType::Float, "float32");

    add_span(spans, true, name, param, row.param, size_of(row.param_dtype));
    add_span(spans, false, at("grads", i), lists.grads[i], row.grad, size_of(row.grad_dtype));
    if (row.master) add_span(spans, true, at("masters", i), lists.masters[i], row.master, sizeof(float));
    for (size_t j = 0; j < lists.states.size() / n; ++j)
      add_span(spans, true, at("states", j * n + i), lists.states[j * n + i], row.states[j], wide ? 8 : 4);
    add_span(spans, true, at("steps", i), lists.steps[i], row.step, sizeof(float));
  }
  need_own_memory(op, spans);
  return rows;
}

std::vector<GradRow> grad_rows(const std::string& op, const Tensors& grads, bool written) {
  std::vector<GradRow> rows(grads.size());
  std::vector<Span> spans;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Name name = at("grads", i);
    need_device(op, name, grads[i], at("grads", 0), grads[0]);
    rows[i].dtype = dtype_of(op, name, grads[i]);
    rows[i].grad = data_of(op, name, grads[i]);
    rows[i].numel = grads[i].numel();
    if (written) add_span(spans, true, name, grads[i], rows[i].grad, size_of(rows[i].dtype));
  }
  need_own_memory(op, spans);
  return rows;
}

std::vector<StepRow> packed_step_rows(const Tensor& rows, const Tensor& grads) {
  constexpr int64_t kColumns = 8;
  const int64_t n = packed_count("packed_step_", rows, kColumns);
  if (packed_count("packed_step_", grads, 1) != n) fail("packed_step_", "grads and rows differ in length");
  const auto* from = static_cast<const int64_t*>(rows.data_ptr());
  const auto* grad = static_cast<void* const*>(grads.data_ptr());
  std::vector<StepRow> unpacked(n);
  for (int64_t i = 0; i < n; ++i, from += kColumns) {
    void* const* at = reinterpret_cast<void* const*>(from);
    unpacked[i] = {grad[i],
                   at[0],
                   static_cast<float*>(at[1]),
                   {at[2], at[3], at[4]},
                   static_cast<float*>(at[5]),
                   from[6],
                   static_cast<DType>(from[7] >> 8),
                   static_cast<DType>(from[7] & 255)};
  }
  return unpacked;
}

std::vector<GradRow> packed_grad_rows(const Tensor& rows) {
  const int64_t n = packed_count("packed_grad_stats", rows, 3);
  std::vector<GradRow> unpacked(n);
  const auto* from = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < n; ++i)
    unpacked[i] = {reinterpret_cast<void* const*>(from)[i], from[n + i], static_cast<DType>(from[2 * n + i])};
  return unpacked;
}

float* scalar_at(const std::string& op, const char* name, const OptionalTensor& scalar, const Tensor& like) {
  return one_element<float>(op, {name}, scalar, like, ScalarType::Float, "float32");
}

int32_t* int_scalar_at(const std::string& op, const char* name, const OptionalTensor& scalar, const Tensor& like) {
  return one_element<int32_t>(op, {name}, scalar, like, ScalarType::Int, "int32");
}

RuleId rule_for(const std::string& op, size_t params, size_t states) {
  std::string known;
#define FUSEDAMP_RULE(rule_op, Rule)                                                 \
  if (op == #rule_op "_") {                                                          \
    if (states == params * Rule::kStates) return k##Rule;                            \
    known += (known.empty() ? "" : " or ") + std::to_string(params * Rule::kStates); \
  }
#include "../math/optimizers.def"
  fail(op, "states has ", states, " tensors for ", params, " params; expected ", known);
}

StepScalars step_scalars(const std::string& op, const Tensor& like, double lr, const std::vector<double>& hyper,
                         bool maximize, const OptionalTensor& lr_tensor, const OptionalTensor& inv_scale,
                         const OptionalTensor& clip_coef, const OptionalTensor& found_inf) {
  StepScalars s = {};
  size_t wanted = 0;
#define FUSEDAMP_OP(rule_op, Hyper) \
  if (op == #rule_op "_") wanted = sizeof(Hyper) / sizeof(double);
#include "../math/optimizers.def"
  if (hyper.size() != wanted) fail(op, "hyper has ", hyper.size(), " values; expected ", wanted);
  for (size_t i = 0; i < wanted; ++i) s.hyper[i] = hyper[i];
  s.lr = lr;
  s.maximize = maximize;
  if (lr_tensor) {
    need_device(op, {"lr"}, *lr_tensor, at("params", 0), like);
    s.lr_dtype = dtype_of(op, {"lr"}, *lr_tensor);
    if (lr_tensor->numel() != 1 || is_16bit(s.lr_dtype))
      fail(op, "lr is ", dtype_name(*lr_tensor), " of shape ", list_text(lr_tensor->sizes()),
           "; expected one float32 or float64 element");
    s.lr_tensor = data_of(op, {"lr"}, *lr_tensor);
  }
  s.inv_scale = scalar_at(op, "inv_scale", inv_scale, like);
  s.clip_coef = scalar_at(op, "clip_coef", clip_coef, like);
  s.found_inf = scalar_at(op, "found_inf", found_inf, like);
  return s;
}

}  // namespace fusedamp
