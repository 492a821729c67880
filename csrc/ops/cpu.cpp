// The ops on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>

#include "../engine/cpu/engine.h"
#include "../math/loss_scale.h"
#include "rows.h"

namespace fusedamp {
namespace {

// One region on torch's own thread pool; each thread takes the next unit when it is done with one.
void parallel(int64_t units, const std::function<void(int64_t)>& run) {
  const int64_t threads = std::min<int64_t>(units, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t u = 0; u < units; ++u) run(u);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < units;) run(u);
  });
}

template <const char* const& kName>
void step(Tensors params, Tensors grads, Tensors masters, Tensors states, Tensors steps, Tensors scales, double lr,
          std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor, OptionalTensor inv_scale,
          OptionalTensor clip_coef, OptionalTensor found_inf, std::vector<int64_t> seeds, bool stochastic_rounding) {
  if (params.empty()) return;
  const std::string op = kName;
  const StepLists lists = {params, grads, masters, states, steps, scales, seeds};
  const CheckedStep checked =
      checked_step(op, lists, lr, hyper, maximize, lr_tensor, inv_scale, clip_coef, found_inf, stochastic_rounding);
  cpu::step(checked.rule, checked.rows, checked.scalars, parallel);
}

void packed_step_(Tensor rows, Tensor grads, Tensor like, std::string op, int64_t states, double lr,
                  std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor, OptionalTensor inv_scale,
                  OptionalTensor clip_coef, OptionalTensor found_inf, bool stochastic_rounding) {
  const StepScalars scalars =
      step_scalars(op, like, lr, hyper, maximize, lr_tensor, inv_scale, clip_coef, found_inf, stochastic_rounding);
  const RuleId rule = rule_for(op, 1, states);
  const std::vector<StepRow> unpacked = packed_step_rows(op, rule, rows, grads);
  need_counts(op, unpacked);
  cpu::step(rule, unpacked, scalars, parallel);
}

void unscale_(Tensors grads, Tensor inv_scale, Tensor found_inf) {
  if (grads.empty()) return;
  const auto rows = grad_rows("unscale_", grads, true);
  const float inv = *scalar_at("unscale_", "inv_scale", inv_scale, grads[0]);
  float* found = scalar_at("unscale_", "found_inf", found_inf, grads[0]);
  if (cpu::unscale(rows, inv, parallel)) *found = 1.0f;
}

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Stats stats_of(const std::vector<GradRow>& rows, const Tensor& like, const OptionalTensor& inv_scale,
               double norm_type) {
  using torch::headeronly::ScalarType;
  const auto n = static_cast<int64_t>(rows.size());
  const float* inv = scalar_at("grad_stats", "inv_scale", inv_scale, like);
  Tensor found_inf = torch::stable::new_empty(like, {}, ScalarType::Float);
  Tensor total = torch::stable::new_empty(like, {}, ScalarType::Double);
  Tensor per_tensor = torch::stable::new_empty(like, {n}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(like, {n, 3}, ScalarType::Long);
  const cpu::ListStats all =
      cpu::grad_stats(rows, inv ? *inv : 1.0f, norm_type, static_cast<double*>(per_tensor.data_ptr()),
                      static_cast<int64_t*>(counts.data_ptr()), parallel);
  *static_cast<float*>(found_inf.data_ptr()) = all.found_inf ? 1.0f : 0.0f;
  *static_cast<double*>(total.data_ptr()) = all.total;
  return {found_inf, total, per_tensor, counts};
}

Stats grad_stats(Tensors grads, OptionalTensor inv_scale, double norm_type) {
  STD_TORCH_CHECK(!grads.empty(), "[grad_stats] grads is empty; expected at least one tensor");
  return stats_of(grad_rows("grad_stats", grads), grads[0], inv_scale, norm_type);
}

Stats packed_grad_stats(Tensor rows, Tensor like, OptionalTensor inv_scale, double norm_type) {
  return stats_of(packed_grad_rows(rows), like, inv_scale, norm_type);
}

void update_scale_(Tensor scale, Tensor growth_tracker, OptionalTensor hysteresis_tracker, Tensor found_inf,
                   double growth_factor, double backoff_factor, int64_t growth_interval, double min_scale,
                   double max_scale, int64_t hysteresis, bool refill_on_good_step) {
  const char* op = "update_scale_";
  float* scale_at = scalar_at(op, "scale", scale, scale);
  int32_t* tracker_at = int_scalar_at(op, "growth_tracker", growth_tracker, scale);
  int32_t* budget_at = int_scalar_at(op, "hysteresis_tracker", hysteresis_tracker, scale);
  const float* found = scalar_at(op, "found_inf", found_inf, scale);
  const LossScaleRule rule = {growth_factor,   backoff_factor, min_scale,          max_scale,
                              growth_interval, hysteresis,     refill_on_good_step};
  const LossScaleState now = {*scale_at, *tracker_at, budget_at ? *budget_at : 1};
  const LossScaleState next = next_loss_scale(rule, now, !(*found == 0.0f));
  *scale_at = next.scale;
  *tracker_at = next.growth_tracker;
  if (budget_at) *budget_at = next.budget;
}

#define FUSEDAMP_OP(op, Hyper) const char* const kName_##op = #op "_";
#include "../math/optimizers.def"

std::string cpu_target() { return cpu::kernels().name; }

std::string step_ops() {
  return ""
#define FUSEDAMP_OP(op, Hyper) #op "_ "
#include "../math/optimizers.def"
      ;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CompositeExplicitAutograd, m) {
  m.impl("cpu_target", TORCH_BOX(&cpu_target));
  m.impl("step_ops", TORCH_BOX(&step_ops));
}

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CPU, m) {
  m.impl("unscale_", TORCH_BOX(&unscale_));
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
  m.impl("_check_step", TORCH_BOX(&check_step));
  m.impl("_find_shared_memory", TORCH_BOX(&find_shared_memory));
  m.impl("update_scale_", TORCH_BOX(&update_scale_));
  m.impl("_packed_step_", TORCH_BOX(&packed_step_));
  m.impl("_packed_grad_stats", TORCH_BOX(&packed_grad_stats));
#define FUSEDAMP_OP(op, Hyper) m.impl(#op "_", TORCH_BOX(&step<kName_##op>));
#include "../math/optimizers.def"
}

}  // namespace fusedamp
