// fusedamp's ops, called by name as Python calls them. All checks and kernels are behind them.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "text.h"
#include "version.h"

namespace fusedamp::detail {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// None for an undefined tensor.
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// What an op says about its arguments, without file and line of this build; empty for errors of torch or a device.
inline std::string complaint(const std::string& op, const std::string& error) {
  const size_t begin = error.find("[" + op + "] ");
  return begin == std::string::npos ? "" : error.substr(begin, error.find('\n', begin) - begin);
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

// rows: int64 [3, n] on the CPU, addresses, numbers of elements and DType codes. like: a tensor on their device.
inline GradStats packed_grad_stats(const Tensor& rows, const Tensor& like, const Tensor& inv_scale, double norm_type,
                                   const Numerics& numerics = {}) {
  const auto found = numerics.due.defined()
                         ? call("_packed_grad_numerics", "grad_numerics", rows, like, numerics.extremes,
                                numerics.histogram, numerics.due, optional(inv_scale), norm_type, true, false)
                         : call("_packed_grad_stats", "grad_stats", rows, like, optional(inv_scale), norm_type);
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
  if (!grads.empty()) call("unscale_", "", grads, inv_scale, found_inf);
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
}

inline void update_scale_headroom_(const Tensor& scale, const Tensor& state, const Tensor& found_inf,
                                   const Tensor& largest, int64_t headroom_bits, const ScaleRule& rule) {
  call("update_scale_headroom_", "", scale, state, found_inf, largest, headroom_bits, rule.growth_interval,
       rule.min_scale, rule.max_scale);
}

}  // namespace fusedamp::detail
