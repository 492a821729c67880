// fusedamp's ops, called by name as Python calls them. All checks and kernels are behind them.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../rows.h"
#include "../version.h"
#include "text.h"

namespace fusedamp::detail {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// The code of a gradient's dtype, if the ops have kernels for it.
inline std::optional<DType> dtype_of(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kHalf: return DType::f16;
    case c10::kBFloat16: return DType::bf16;
    case c10::kFloat: return DType::f32;
    case c10::kDouble: return DType::f64;
    default: return std::nullopt;
  }
}

// None for an undefined tensor.
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// What an op says about its arguments, without file and line of this build; empty for errors of torch or a device.
inline std::string complaint(const std::string& op, const std::string& error) {
  const size_t begin = error.find("[" + op + "] ");
  return begin == std::string::npos ? "" : error.substr(begin, error.find('\n', begin) - begin);
}

// The name of the first argument that has no memory, "grads[3]"; empty if all have.
inline std::string meta_argument(const c10::FunctionSchema& schema, const torch::jit::Stack& stack) {
  for (size_t i = 0; i < std::min(stack.size(), schema.arguments().size()); ++i) {
    const std::string& name = schema.arguments()[i].name();
    if (stack[i].isTensor() && stack[i].toTensor().defined() && stack[i].toTensor().is_meta()) return name;
    if (!stack[i].isTensorList()) continue;
    const Tensors tensors = stack[i].toTensorVector();
    for (size_t j = 0; j < tensors.size(); ++j)
      if (tensors[j].is_meta()) return text(name, "[", j, "]");
  }
  return "";
}

// The op fusedamp::<name>. Boxed calls take every argument of its schema, also those with defaults.
// `also`: another op in whose name it may complain.
template <class... Args>
torch::jit::Stack call(const char* name, const std::string& also, Args&&... args) {
  check_version();
  torch::jit::Stack stack;
  stack.reserve(sizeof...(Args));
  (stack.emplace_back(std::forward<Args>(args)), ...);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("fusedamp::" + std::string(name)).c_str(), "");
  std::string message;
  try {
    op.callBoxed(stack);
    return stack;
  } catch (const c10::NotImplementedError& error) {
    const std::string meta = meta_argument(op.schema(), stack);
    if (!meta.empty())
      refuse_value(text("[", also.empty() ? name : also, "] ", meta,
                        " is on the meta device and has no data; expected ",
                        "a tensor with memory. Move it with .to_empty() first"));
    message = text("[", also.empty() ? name : also, "] has no kernel for these tensors in this program; expected ",
                   "libfusedamp_cuda.so beside CUDA tensors. Build fusedamp with nvcc, and link fusedamp::fusedamp. ",
                   error.what_without_backtrace());
    C10_THROW_ERROR(NotImplementedError, message);
  } catch (const std::exception& error) {
    const auto* torchs = dynamic_cast<const c10::Error*>(&error);
    const std::string what = torchs ? torchs->what_without_backtrace() : error.what();
    for (const std::string& one : {also, std::string(name)})
      if (!one.empty() && message.empty()) message = complaint(one, what);
    if (message.empty()) throw;
  }
  refuse_value(message);
}

// An op does not move the version counters of what it wrote; autograd must notice all the same.
inline void bump(const Tensor& written) {
  if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
}

// One parameter list of a step op, as its check takes it.
struct StepLists {
  std::string op;  // "adamw_"
  Tensors params, grads, masters, states, steps, scales;
  double lr = 0.0;
  std::vector<double> hyper;
  bool maximize = false;
  Tensor lr_tensor;
  std::vector<int64_t> seeds;
  bool stochastic_rounding = false;
};

// What a scaler hands to a step on one device: FP32 tensors of one element, or undefined. Of the log, all or none.
struct StepInputs {
  Tensor inv_scale, clip_coef, found_inf;
  Tensor counts, log_counts, log_step, log_steps;  // int64
};

inline void check_step(const StepLists& s, const StepInputs& in) {
  call("_check_step", s.op, s.params, s.grads, s.masters, s.states, s.steps, s.scales, s.op, s.lr, s.hyper, s.maximize,
       optional(s.lr_tensor), optional(in.inv_scale), optional(in.clip_coef), optional(in.found_inf), s.seeds,
       s.stochastic_rounding, std::vector<int64_t>(), OptionalTensor(), OptionalTensor(), OptionalTensor());
}

// The places of two tensors that share memory, of which one is among the first `written`; -1, -1 if none do.
inline std::pair<int64_t, int64_t> find_shared_memory(const Tensors& tensors, int64_t written) {
  const auto found = call("_find_shared_memory", "", tensors, written);
  return {found[0].toInt(), found[1].toInt()};
}

inline int64_t rule_of(const std::string& op, int64_t states) { return call("_rule_of", op, op, states)[0].toInt(); }

// The names of an op's hyper-parameters, in its order.
inline std::vector<std::string> hyper_names(const std::string& op) {
  std::istringstream names(call("_hyper_names", op, op)[0].toStringRef());
  std::vector<std::string> found;
  for (std::string name; names >> name;) found.push_back(name);
  return found;
}

inline void check_plan(const Tensor& rows, const Tensor& groups, const Tensor& like) {
  call("_check_plan", "", rows, groups, like);
}

inline void planned_step(const std::string& op, const Tensor& rows, const Tensor& grads, const Tensor& groups,
                         const Tensor& like, const StepInputs& in) {
  call("_planned_step_", op, rows, grads, groups, like, optional(in.inv_scale), optional(in.clip_coef),
       optional(in.found_inf), optional(in.counts), optional(in.log_counts), optional(in.log_step),
       optional(in.log_steps), OptionalTensor(), OptionalTensor());
}

// Whether what runs now on the device of `like` is recorded into a CUDA graph.
inline bool is_capturing(const Tensor& like) { return like.is_cuda() && call("_is_capturing", "", like)[0].toBool(); }

inline void recode(const Tensor& source, const Tensor& target, const Tensor& weight, const Tensor& scales) {
  call("_recode_", "", source, target, optional(weight), optional(scales));
}

// Results of a gradient check, on the gradients' device.
struct GradStats {
  Tensor found_inf;   // float32, 0-d: 1 if an element is not finite before or after unscaling, else 0
  Tensor total;       // float64, 0-d: the sum of |g * inv_scale|^p; the maximum for p = inf
  Tensor per_tensor;  // float64 [n]: the same for each tensor
  Tensor counts;      // int64 [n, 3]: inf, NaN, finite but overflowing when unscaled
};

// What a check tells beside: float64 [n, 3], int64 [n, 64], int32 []; all undefined for nothing. The histogram is not
// written, as `due` is 0; of the extremes only the first column, the largest magnitudes as stored, is valid.
struct Numerics {
  Tensor extremes, histogram, due;
};

// Addresses, numbers of elements and DType codes of dense tensors: int64 [3, n] on the CPU. Undefined if one of them
// cannot be read by its address.
inline Tensor grad_rows(const Tensors& grads) {
  const auto n = static_cast<int64_t>(grads.size());
  Tensor rows = at::empty({3, n}, at::kLong);
  auto* words = rows.data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& grad = grads[i];
    const std::optional<DType> dtype = dtype_of(grad.scalar_type());
    if (!dtype || grad.is_meta() || grad.is_neg() || !grad.has_storage()) return {};
    const void* data = grad.const_data_ptr();
    if (!data && grad.numel() > 0) return {};
    words[i] = reinterpret_cast<int64_t>(data);
    words[n + i] = grad.numel();
    words[2 * n + i] = static_cast<int64_t>(*dtype);
  }
  return rows;
}

inline GradStats grad_stats(const Tensors& grads, const Tensor& inv_scale, double norm_type,
                            const Numerics& numerics = {}) {
  const Tensor rows = grad_rows(grads);
  const bool counts = numerics.due.defined();
  const OptionalTensor inverse = optional(inv_scale);
  const auto found = !rows.defined() && !counts ? call("grad_stats", "", grads, inverse, norm_type)
                     : !rows.defined() ? call("grad_numerics", "", grads, numerics.extremes, numerics.histogram,
                                              numerics.due, inverse, norm_type)
                     : !counts ? call("_packed_grad_stats", "grad_stats", rows, grads[0], inverse, norm_type)
                               : call("_packed_grad_numerics", "grad_numerics", rows, grads[0], numerics.extremes,
                                      numerics.histogram, numerics.due, inverse, norm_type, true, false);
  return {found[0].toTensor(), found[1].toTensor(), found[2].toTensor(), found[3].toTensor()};
}

struct GradCheck {
  Tensor inv_scale, clip_coef, found_inf;  // float32, 0-d
  Tensor norm;                             // float32, or float64 if `wide`
  Tensor counts;                           // int64 [n, 3]
};

inline GradCheck check_grads(const Tensor& rows, const Tensor& scale, double norm_type, double max_norm,
                             const Tensor& max_norm_tensor, bool wide, const Numerics& numerics = {}) {
  const auto found = numerics.due.defined()
                         ? call("_check_numerics", "", rows, numerics.extremes, numerics.histogram, numerics.due, scale,
                                norm_type, max_norm, optional(max_norm_tensor), wide)
                         : call("_check_grads", "", rows, scale, norm_type, max_norm, optional(max_norm_tensor), wide);
  return {found[0].toTensor(), found[1].toTensor(), found[2].toTensor(), found[3].toTensor(), found[4].toTensor()};
}

inline void unscale_(const Tensors& grads, const Tensor& inv_scale, const Tensor& found_inf) {
  if (grads.empty()) return;
  call("unscale_", "", grads, inv_scale, found_inf);
  for (const Tensor& grad : grads) bump(grad);
  bump(found_inf);
}

struct ScaleRule {
  double growth_factor, backoff_factor;
  int64_t growth_interval;
  double min_scale, max_scale;
  int64_t hysteresis;
  bool refill_on_good_step;
};

inline void update_scale_(const Tensor& scale, const Tensor& growth_tracker, const Tensor& hysteresis_tracker,
                          const Tensor& found_inf, const ScaleRule& rule) {
  call("update_scale_", "", scale, growth_tracker, optional(hysteresis_tracker), found_inf, rule.growth_factor,
       rule.backoff_factor, rule.growth_interval, rule.min_scale, rule.max_scale, rule.hysteresis,
       rule.refill_on_good_step);
  bump(scale);
  bump(growth_tracker);
  if (hysteresis_tracker.defined()) bump(hysteresis_tracker);
}

inline void update_scale_headroom_(const Tensor& scale, const Tensor& state, const Tensor& found_inf,
                                   const Tensor& largest, int64_t headroom_bits, const ScaleRule& rule) {
  call("update_scale_headroom_", "", scale, state, found_inf, largest, headroom_bits, rule.growth_interval,
       rule.min_scale, rule.max_scale);
  bump(scale);
  bump(state);
}

}  // namespace fusedamp::detail
