// What an optimizer keeps per parameter: step count, master, states, in the formats that its options choose.
#pragma once
#include <ATen/Functions.h>
#include <sys/mman.h>

#include "../options.h"
#include "../rows.h"
#include "layout.h"
#include "ops.h"

namespace fusedamp::optim::detail {

using at::Tensor;

// optimizer.state()[param]. States and scales are in the order of Options::states(). Masters and states have the
// parameter's shape and strides; an int16 master is a split one's remainder, int8 and uint8 states have block scales.
struct ParamState : torch::optim::OptimizerParamState {
  explicit ParamState(const Tensor& param) : owner(param.getIntrusivePtr()) {}

  c10::weak_intrusive_ptr<c10::TensorImpl> owner;  // keeps its address from another parameter, not its memory
  Tensor step, master;
  std::array<Tensor, kMaxStates> states, scales;
  std::vector<std::pair<std::string, c10::IValue>> others;  // that a checkpoint brought beside these

  std::unique_ptr<torch::optim::OptimizerParamState> clone() const override {
    return std::make_unique<ParamState>(*this);
  }
};

// Runs `body`; errors about values and types start with what `where` returns.
template <class Where, class Body>
auto within(const Where& where, const Body& body) {
  try {
    return body();
  } catch (const c10::ValueError& error) {
    refuse_value(text(where(), " ", error.what_without_backtrace()));
  } catch (const c10::TypeError& error) {
    refuse_type(text(where(), " ", error.what_without_backtrace()));
  }
}

// The dtype of a parameter's FP32 master and states: FP64 for FP64. Throws if there is none.
inline c10::ScalarType wide_dtype(const Tensor& param) {
  switch (param.scalar_type()) {
    case c10::kHalf:
    case c10::kBFloat16:
    case c10::kFloat: return c10::kFloat;
    case c10::kDouble: return c10::kDouble;
    case c10::kComplexHalf:
    case c10::kComplexFloat: return c10::kComplexFloat;
    case c10::kComplexDouble: return c10::kComplexDouble;
    default: {
      refuse_value(text("is ", name_of(param.scalar_type()), " of shape ", list_text(param.sizes()), " on ",
                        param.device().str(), "; expected one of float16, bfloat16, float32, float64, complex32, ",
                        "complex64, complex128. Cast it, or leave it out of the optimizer."));
    }
  }
}

// How the states of one parameter are kept.
struct Format {
  c10::ScalarType wide;
  bool has_master, is_split;
  c10::ScalarType state;  // kChar: 8 bits
};

inline std::string described(const Tensor& param) {
  return text("is ", name_of(param.scalar_type()), " of shape ", list_text(param.sizes()));
}

// `has_states`: whether a state is like the parameter.
inline Format format_of(const Tensor& param, const Storage& storage, bool has_states) {
  Format format = {wide_dtype(param), false, storage.masters == "split", c10::kFloat};
  format.has_master = storage.masters != "none" && format.wide != param.scalar_type();
  format.state = storage.states == "float32" ? format.wide : storage.states == "int8" ? c10::kChar : c10::kBFloat16;
  if (storage.states != "float32" && has_states && format.wide != c10::kFloat)
    refuse_value(text(described(param), " in a group with state_dtype ", repr(storage.states),
                      "; expected float16, bfloat16 or float32. Put it into a group of its own with "
                      "state_dtype=\"float32\", which means the wide type for it."));
  if (param.is_complex() && (format.is_split || storage.stochastic))
    refuse_value(
        described(param) +
        "; expected a real parameter for split masters and stochastic rounding. Put it into a group of its own "
        "with master_weights=\"fp32\" or \"none\", and stochastic_rounding=False.");
  return format;
}

// Throws if a step cannot write `param` in place.
inline void check_place(const Tensor& param) {
  const auto got = [&] { return text(described(param), " on ", param.device().str()); };
  if (!param.is_cpu() && !param.is_cuda())
    refuse_value(text(got(), "; expected cpu or cuda. ",
                      param.is_meta() ? "Call its to_empty() and initialize it" : "Move the model there",
                      " before the step."));
  if (param.layout() != c10::kStrided) refuse_value(got() + " is sparse; expected a strided parameter.");
  if (param.numel() == 0) return;
  if (!param.unsafeGetTensorImpl()->has_storage() || !param.data_ptr())
    refuse_value(got() + " and has no storage; expected memory to update. Restore it before the step.");
  if (!is_dense(param) && overlaps_itself(param))
    refuse_value(text(got(), " with strides ", list_text(param.strides()),
                      ", so elements share an address; expected one address for each. Use param.contiguous() as the "
                      "parameter."));
}

// A new uninitialized tensor of the same layout. Large ones on the CPU use huge pages, which a tenth of a step is
// worth.
inline Tensor memory_like(const Tensor& like, c10::ScalarType dtype) {
  Tensor made = at::empty_like(like, like.options().dtype(dtype).requires_grad(false));
#ifdef MADV_HUGEPAGE
  if (made.is_cpu()) {
    constexpr uintptr_t kHuge = 2 << 20;
    const auto at = reinterpret_cast<uintptr_t>(made.data_ptr());
    const uintptr_t begin = (at + kHuge - 1) / kHuge * kHuge, end = (at + made.nbytes()) / kHuge * kHuge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return made;
}

inline bool fits(const Tensor& value, const Tensor& param, c10::ScalarType dtype) {
  return value.scalar_type() == dtype && value.device() == param.device() && value.sizes() == param.sizes() &&
         (is_dense(param) ? value.strides() == param.strides() : value.strides() == at::empty_like(param).strides());
}

// A copy on the device and with the strides of `param`.
inline Tensor fitted(const Tensor& value, const Tensor& param, c10::ScalarType dtype) {
  return memory_like(param, dtype).copy_(value.detach());
}

// `t` with the strides of `dense`: itself, a view if only sizes of 1 differ, or a copy.
inline Tensor strided_like(const Tensor& t, const Tensor& dense) {
  if (t.strides() == dense.strides()) return t;
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d) same &= t.size(d) == 1 || t.stride(d) == dense.stride(d);
  if (same) return t.as_strided(dense.sizes(), dense.strides());
  return at::empty_like(dense, dense.options().dtype(t.scalar_type())).copy_(t);
}

inline bool is_8bit(const Tensor& t) { return t.scalar_type() == c10::kChar || t.scalar_type() == c10::kByte; }
inline int64_t scale_count(int64_t numel) { return (numel + kScaleBlock - 1) / kScaleBlock; }

// Dense floating-point values in 8 bits, to the nearest, and their block scales.
inline std::pair<Tensor, Tensor> quantized(const Tensor& values, c10::ScalarType dtype) {
  const Tensor source = values.element_size() < 2 ? values.to(c10::kFloat) : values;  // FP8
  Tensor codes = memory_like(source, dtype);
  Tensor scales = at::empty({scale_count(source.numel())}, source.options().dtype(c10::kFloat));
  recode(source, codes, {}, scales);
  return {codes, scales};
}

inline Tensor dequantized(const Tensor& codes, const Tensor& scales) {
  Tensor values = memory_like(codes, c10::kFloat);
  recode(codes, values, {}, scales);
  return values;
}

inline void check_shape(const char* name, const Tensor& value, const Tensor& param) {
  if (value.sizes() != param.sizes() || value.is_complex() != param.is_complex())
    refuse_value(text("has state ", repr(std::string(name)), " of shape ", list_text(value.sizes()), ", ",
                      torch_name(value), "; expected ", list_text(param.sizes()), " for a ", torch_name(param),
                      " parameter. Load a matching checkpoint, or clear optimizer.state."));
}

// Throws unless the scales can be those of the 8-bit values.
inline void check_scales(const char* name, const Tensor& values, const Tensor& scales) {
  const int64_t wanted = scale_count(values.numel());
  if (!scales.defined() || scales.dim() != 1 || scales.size(0) != wanted || scales.scalar_type() != c10::kFloat)
    refuse_value(text("has 8-bit state ", repr(std::string(name)), " of ", values.numel(),
                      " elements with block scales ",
                      scales.defined() ? text(torch_name(scales), " of shape ", list_text(scales.sizes())) : "None",
                      "; expected torch.float32 of shape [", wanted,
                      "]. Pass what state_dict() returned, or clear optimizer.state."));
}

// The dtype in which a state is kept; kDouble for one element per parameter.
inline c10::ScalarType stored_dtype(const Format& format, const StateSpec& spec) {
  if (spec.scalar) return c10::kDouble;
  return format.state == c10::kChar && spec.nonnegative ? c10::kByte : format.state;
}

// Makes state `s` with its first value.
inline void fill_state(ParamState& state, size_t s, const Tensor& param, const StateSpec& spec, double first,
                       const Format& format) {
  const auto dtype = stored_dtype(format, spec);
  Tensor& made = state.states[s];
  if (spec.scalar) {
    made = at::full({}, first, param.options().dtype(dtype).requires_grad(false));
    return;
  }
  made = memory_like(param, dtype);
  state.scales[s].reset();
  if (!is_8bit(made)) {
    made.fill_(made.is_complex() ? c10::Scalar(c10::complex<double>(first, first)) : c10::Scalar(first));
    return;
  }
  Tensor& scales = state.scales[s] = at::zeros({scale_count(param.numel())}, made.options().dtype(c10::kFloat));
  int64_t code = dtype == c10::kByte;  // 0, as the scale is; uint8 has no zero of its own
  if (first != 0.0) {
    const auto one = quantized(at::full({1}, first, at::kFloat), dtype);
    code = one.first.item<int64_t>();
    scales.fill_(one.second.item<double>());
  }
  made.fill_(code);
}

// Brings state `s` into the layout of `param` and the format; keeps it if it fits already.
inline void adapt_state(ParamState& state, size_t s, const Tensor& param, const StateSpec& spec, const Format& format) {
  const auto dtype = stored_dtype(format, spec);
  Tensor &value = state.states[s], &scales = state.scales[s];
  if (spec.scalar) {
    if (value.numel() != 1 || value.is_complex())
      check_shape(spec.name, value, at::empty({}, param.options().dtype(c10::kDouble)));
    if (value.scalar_type() != dtype || value.dim() != 0 || value.device() != param.device())
      value = value.detach().to(param.device(), dtype, false, true).reshape({});
    return;
  }
  check_shape(spec.name, value, param);
  if (is_8bit(value)) {
    check_scales(spec.name, value, scales);
    if (value.scalar_type() == dtype &&
        value.strides() == (is_dense(param) ? param : at::empty_like(param)).strides()) {
      value = value.to(param.device());
      scales = scales.to(param.device());
      return;
    }
    value = dequantized(value, scales);
    scales.reset();
  } else if (scales.defined()) {
    refuse_value(text("has state ", repr(std::string(spec.name)), " of dtype ", torch_name(value), " beside ",
                      repr(std::string(spec.name) + "_scale"),
                      ", the block scales of an 8-bit state; expected its int8 or uint8 values, or floats alone. ",
                      "Quantized values are not numbers: load the checkpoint into an optimizer with "
                      "state_dtype=\"float32\" first, or remove ",
                      repr(std::string(spec.name) + "_scale"), "."));
  } else if (!value.is_floating_point() && !value.is_complex()) {
    refuse_value(text("has state ", repr(std::string(spec.name)), " of dtype ", torch_name(value),
                      "; expected floating-point values, or a state as this optimizer made it. Assign floats, or ",
                      "remove the state."));
  }
  if (dtype != c10::kChar && dtype != c10::kByte) {
    if (!fits(value, param, dtype)) value = fitted(value, param, dtype);
    return;
  }
  const Tensor like = is_dense(param) ? param : at::empty_like(param);
  const Tensor dense = value.strides() == like.strides() ? value : memory_like(like, value.scalar_type()).copy_(value);
  std::tie(value, scales) = quantized(dense.detach().to(param.device()), dtype);
}

inline void check_master(const Tensor& value, const Tensor& param) {
  check_shape("master", value, param);
  if (value.scalar_type() != c10::kShort && !value.is_floating_point() && !value.is_complex())
    refuse_value(text("has a master of dtype ", torch_name(value),
                      "; expected floating-point values, or the remainder of a split master. Remove ",
                      "state[\"master\"]: it is recreated from the weight."));
}

// Makes the master of `param`, or brings it into the format. A master whose rounding is not its weight follows the
// weight, which was modified (csrc/math/follow.h).
inline void keep_master(ParamState& state, const Tensor& param, const Format& format) {
  const auto dtype = format.is_split ? c10::kShort : format.wide;
  Tensor& master = state.master;
  if (!master.defined()) {
    master = memory_like(param, dtype);
    format.is_split ? master.zero_() : master.copy_(param);
    return;
  }
  check_master(master, param);
  if (fits(master, param, dtype)) return;
  const bool was_split = master.scalar_type() == c10::kShort;
  const Tensor value = fitted(master, param, was_split ? c10::kShort : format.wide);
  if (was_split == format.is_split) {
    master = value;
    return;
  }
  const Tensor weight = strided_like(param.detach(), value), made = memory_like(param, dtype);
  recode(value, made, weight, {});
  if (format.is_split && weight.data_ptr() != param.data_ptr()) param.detach().copy_(weight);  // ties were rewritten
  master = made;
}

constexpr double kMostSteps = 4611686018427387904.0;  // 2^62

[[noreturn]] inline void refuse_count(const std::string& got) {
  refuse_value(text("has step count ", got, "; expected a whole number from 0 to 2**62. Load an intact ",
                    "checkpoint, or assign the number of steps taken."));
}
inline bool is_count(double count) { return count >= 0.0 && count <= kMostSteps && std::floor(count) == count; }

// Makes the step count, or brings it into the form that ops take: FP32, 0-d. Counts on a device are not read.
inline void keep_step(ParamState& state, const Tensor& param) {
  Tensor& step = state.step;
  if (!step.defined()) {
    step = at::zeros({}, param.options().dtype(c10::kFloat).requires_grad(false));
    return;
  }
  if (step.numel() != 1)
    refuse_value(
        text("has a step count of shape ", list_text(step.sizes()), "; expected one number. Assign a 0-d tensor."));
  if (step.is_cpu() && !is_count(step.item<double>())) refuse_count(repr(step.item<double>()));
  if (step.scalar_type() != c10::kFloat || step.dim() != 0 || step.device() != param.device())
    step = step.detach().to(param.device(), c10::kFloat, false, true).reshape({});
}

}  // namespace fusedamp::optim::detail
