// Every op once, for every backend: signature, checks, registration. A backend says what runs them:
//   Backend(like)                      on the device of a tensor `like`; made when nothing can be refused any more
//   step, unscale, grad_stats, check_grads, update_scale, update_scale_headroom, recode, record: the passes, on
//   addresses
//   is_capturing                       whether its stream records a CUDA graph
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "../math/headroom.h"
#include "../math/loss_scale.h"
#include "packed.h"
#include "recoding.h"
#include "recording.h"

namespace fusedamp {

const char* origin();  // version and hash of the sources; setup.py writes it

#define FUSEDAMP_OP(op, Hyper, names) inline constexpr const char* kName_##op = #op "_";
#include "../math/optimizers.def"

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class Backend>
struct Ops {
  template <const char* const& kName>
  static void step(Tensors params, Tensors grads, Tensors masters, Tensors states, Tensors steps, Tensors scales,
                   double lr, std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor,
                   OptionalTensor inv_scale, OptionalTensor clip_coef, OptionalTensor found_inf,
                   std::vector<int64_t> seeds, bool stochastic_rounding, std::vector<int64_t> places,
                   OptionalTensor squares, OptionalTensor updates, OptionalTensor due) {
    if (params.empty()) return;
    const StepLists lists = {params, grads, masters, states, steps, scales, seeds, places, squares, updates, due};
    const CheckedStep checked = checked_step(kName, lists, lr, hyper, maximize, lr_tensor, inv_scale, clip_coef,
                                             found_inf, stochastic_rounding);
    const StepTable table = {checked.rows.rows.data(), checked.rows.grads.data(), checked.group.count};
    Backend(params[0]).step(table, {&checked.group, 1}, checked.scalars, {}, checked.tally);
  }

  static bool is_capturing(Tensor like) { return Backend(like).is_capturing(); }

  static Tensor measure_(Tensors params, Tensors grads, Tensors masters, Tensors states, Tensors steps, Tensors scales,
                         std::string op, double lr, std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor,
                         OptionalTensor inv_scale, OptionalTensor clip_coef, OptionalTensor found_inf) {
    const auto n = static_cast<int64_t>(params.size());
    STD_TORCH_CHECK(n > 0, "[_measure_] params is empty; expected at least one tensor");
    const OptionalTensor squares = torch::stable::new_zeros(params[0], {n, kMaxNorms}, ScalarType::Double);
    const std::vector<int64_t> none;
    const StepLists lists = {params, grads, masters, states, steps, scales, none, none, squares, {}, {}};
    const CheckedStep checked =
        checked_step(op, lists, lr, hyper, maximize, lr_tensor, inv_scale, clip_coef, found_inf, false);
    const StepTable table = {checked.rows.rows.data(), checked.rows.grads.data(), checked.group.count};
    Backend(params[0]).measure(table, {&checked.group, 1}, checked.scalars);
    return *squares;
  }

  static void planned_step_(Tensor rows, Tensor grads, Tensor groups, Tensor like, OptionalTensor inv_scale,
                            OptionalTensor clip_coef, OptionalTensor found_inf, OptionalTensor counts,
                            OptionalTensor log_counts, OptionalTensor log_step, OptionalTensor log_steps,
                            OptionalTensor updates, OptionalTensor due) {
    const PlannedStep plan = planned_step(rows, grads, groups);
    const StepScalars scalars = step_scalars(plan.op, like, inv_scale, clip_coef, found_inf);
    const StepLog log = step_log(plan.op, like, counts, log_counts, log_step, log_steps);
    const Tally tally = step_tally(plan.op, like, plan.table.count, updates, due);
    for (int64_t g = 0; like.is_cpu() && g < plan.groups.count; ++g) {
      const StepGroup& group = plan.groups.groups[g];
      need_counts(op_of(group.rule), plan.table.rows + group.first, group.count);
    }
    Backend(like).step(plan.table, plan.groups, scalars, log, tally);
  }

  static void unscale_(Tensors grads, Tensor inv_scale, Tensor found_inf) {
    if (grads.empty()) return;
    const auto rows = grad_rows("unscale_", grads, true);
    const float* inv = scalar_at("unscale_", "inv_scale", inv_scale, grads[0]);
    float* found = scalar_at("unscale_", "found_inf", found_inf, grads[0]);
    Backend(grads[0]).unscale(rows, inv, found);
  }

  using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Stats grad_stats(Tensors grads, OptionalTensor inv_scale, double norm_type) {
    STD_TORCH_CHECK(!grads.empty(), "[grad_stats] grads is empty; expected at least one tensor");
    return stats_of("grad_stats", grad_rows("grad_stats", grads), grads[0], inv_scale, norm_type);
  }

  static Stats packed_grad_stats(Tensor rows, Tensor like, OptionalTensor inv_scale, double norm_type) {
    return stats_of("grad_stats", packed_grad_rows("grad_stats", rows), like, inv_scale, norm_type);
  }

  static Stats grad_numerics(Tensors grads, Tensor extremes, Tensor histogram, Tensor due, OptionalTensor inv_scale,
                             double norm_type) {
    const char* op = "grad_numerics";
    STD_TORCH_CHECK(!grads.empty(), "[grad_numerics] grads is empty; expected at least one tensor");
    const std::vector<GradRow> rows = grad_rows(op, grads);
    return stats_of(op, rows, grads[0], inv_scale, norm_type,
                    numerics_of(op, rows, grads[0], extremes, histogram, due, {{"inv_scale", inv_scale}}));
  }

  static Stats packed_grad_numerics(Tensor packed, Tensor like, Tensor extremes, Tensor histogram, Tensor due,
                                    OptionalTensor inv_scale, double norm_type, bool lean, bool only_due) {
    const char* op = "grad_numerics";
    const std::vector<GradRow> rows = packed_grad_rows(op, packed);
    Numerics numerics = numerics_of(op, rows, like, extremes, histogram, due, {{"inv_scale", inv_scale}});
    numerics.lean = lean;
    numerics.only_due = only_due;
    return stats_of(op, rows, like, inv_scale, norm_type, numerics);
  }

  using Check = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Check check_grads(Tensor rows, Tensor scale, double norm_type, double max_norm, OptionalTensor max_norm_tensor,
                           bool wide) {
    const char* op = "_check_grads";
    return check_of(op, packed_grad_rows(op, rows), scale, norm_type, max_norm, max_norm_tensor, wide);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> check_numerics(
      Tensor packed, Tensor extremes, Tensor histogram, Tensor due, Tensor scale, double norm_type, double max_norm,
      OptionalTensor max_norm_tensor, bool wide) {
    const char* op = "_check_numerics";
    const std::vector<GradRow> rows = packed_grad_rows(op, packed);
    const Reads reads = {{"scale", scale}, {"max_norm", max_norm_tensor}};
    Numerics numerics = numerics_of(op, rows, scale, extremes, histogram, due, reads);
    numerics.lean = true;
    const Tensor per_tensor = torch::stable::new_empty(scale, {static_cast<int64_t>(rows.size())}, ScalarType::Double);
    return std::tuple_cat(
        check_of(op, rows, scale, norm_type, max_norm, max_norm_tensor, wide, data<double>(per_tensor), numerics),
        std::tuple(per_tensor));
  }

  static void update_scale_(Tensor scale, Tensor growth_tracker, OptionalTensor hysteresis_tracker, Tensor found_inf,
                            double growth_factor, double backoff_factor, int64_t growth_interval, double min_scale,
                            double max_scale, int64_t hysteresis, bool refill_on_good_step) {
    const char* op = "update_scale_";
    float* scale_at = scalar_at(op, "scale", scale, scale);
    int32_t* tracker_at = int_scalar_at(op, "growth_tracker", growth_tracker, scale);
    int32_t* budget_at = int_scalar_at(op, "hysteresis_tracker", hysteresis_tracker, scale);
    const float* found = scalar_at(op, "found_inf", found_inf, scale);
    const LossScaleRule rule = {growth_factor,   backoff_factor, min_scale,          max_scale,
                                growth_interval, hysteresis,     refill_on_good_step};
    Backend(scale).update_scale(rule, scale_at, tracker_at, budget_at, found);
  }

  static void update_scale_headroom_(Tensor scale, Tensor state, Tensor found_inf, Tensor largest,
                                     int64_t headroom_bits, int64_t growth_interval, double min_scale,
                                     double max_scale) {
    const char* op = "update_scale_headroom_";
    float* scale_at = scalar_at(op, "scale", scale, scale);
    need_device(op, {"state"}, state, {"scale"}, scale);
    constexpr int64_t kLength = sizeof(HeadroomState) / sizeof(int32_t);
    if (state.scalar_type() != ScalarType::Int || state.dim() != 1 || state.numel() != kLength)
      fail(op, "state is ", dtype_name(state), " of shape ", list_text(state.sizes()), "; expected int32 of shape [",
           kLength, "]. Start with zeros");
    auto* state_at = static_cast<HeadroomState*>(data_of(op, {"state"}, state));
    const float* found = scalar_at(op, "found_inf", found_inf, scale);
    const double* largest_at = one_element<double>(op, {"largest"}, largest, scale, ScalarType::Double, "float64");
    const HeadroomRule rule = headroom_rule(headroom_bits, growth_interval, min_scale, max_scale);
    if (rule.least > rule.largest)
      fail(op, "min_scale is ", min_scale, " and max_scale ", max_scale,
           "; expected a power of two from 2^-126 to 2^127 between them. Use powers of two for both");
    Backend(scale).update_scale_headroom(rule, scale_at, state_at, found, largest_at);
  }

  static void recode_(Tensor source, Tensor target, OptionalTensor weight, OptionalTensor scales) {
    const Recoding job = checked_recoding(source, target, weight, scales);
    Backend(source).recode(job);
  }

  static void record_(Tensor clock, Tensor due, Tensor steps, Tensor numbers, Tensor bins, OptionalTensor trajectory,
                      Tensor extremes, Tensor histogram, Tensor squares, int64_t every, OptionalTensor updates,
                      OptionalTensor scale, OptionalTensor found_inf, bool only_due, bool advance) {
    const Rings rings = {clock, due, steps, numbers, bins, trajectory};
    const Counted counted = {extremes, histogram, squares, updates, scale, found_inf};
    StepRecord record = checked_record(rings, counted, every);
    record.only_due = only_due;
    record.advance = advance;
    Backend(clock).record(record);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("unscale_", TORCH_BOX(&Ops::unscale_));
    m.impl("grad_numerics", TORCH_BOX(&Ops::grad_numerics));
    m.impl("grad_stats", TORCH_BOX(&Ops::grad_stats));
    m.impl("update_scale_", TORCH_BOX(&Ops::update_scale_));
    m.impl("update_scale_headroom_", TORCH_BOX(&Ops::update_scale_headroom_));
    m.impl("_check_grads", TORCH_BOX(&Ops::check_grads));
    m.impl("_check_numerics", TORCH_BOX(&Ops::check_numerics));
    m.impl("_check_plan", TORCH_BOX(&check_plan));
    m.impl("_check_step", TORCH_BOX(&check_step));
    m.impl("_find_shared_memory", TORCH_BOX(&find_shared_memory));
    m.impl("_is_capturing", TORCH_BOX(&Ops::is_capturing));
    m.impl("_measure_", TORCH_BOX(&Ops::measure_));
    m.impl("_packed_grad_numerics", TORCH_BOX(&Ops::packed_grad_numerics));
    m.impl("_packed_grad_stats", TORCH_BOX(&Ops::packed_grad_stats));
    m.impl("_planned_step_", TORCH_BOX(&Ops::planned_step_));
    m.impl("_recode_", TORCH_BOX(&Ops::recode_));
    m.impl("_record_", TORCH_BOX(&Ops::record_));
#define FUSEDAMP_OP(op, Hyper, names) m.impl(#op "_", TORCH_BOX(&Ops::template step<kName_##op>));
#include "../math/optimizers.def"
  }

 private:
  static Stats stats_of(const char* op, const std::vector<GradRow>& rows, const Tensor& like,
                        const OptionalTensor& inv_scale, double norm_type, const Numerics& numerics = {}) {
    const auto n = static_cast<int64_t>(rows.size());
    const float* inv = scalar_at(op, "inv_scale", inv_scale, like);
    const Tensor found_inf = torch::stable::new_empty(like, {}, ScalarType::Float);
    const Tensor total = torch::stable::new_empty(like, {}, ScalarType::Double);
    const Tensor per_tensor = torch::stable::new_empty(like, {n}, ScalarType::Double);
    const Tensor counts = torch::stable::new_empty(like, {n, 3}, ScalarType::Long);
    Backend(like).grad_stats(
        rows, inv, norm_type,
        {data<float>(found_inf), data<double>(total), data<double>(per_tensor), data<int64_t>(counts)}, numerics);
    return {found_inf, total, per_tensor, counts};
  }

  static Check check_of(const char* op, const std::vector<GradRow>& grads, const Tensor& scale, double norm_type,
                        double max_norm, const OptionalTensor& max_norm_tensor, bool wide, double* per_tensor = nullptr,
                        const Numerics& numerics = {}) {
    GradCheck check = {};
    check.scale = scalar_at(op, "scale", scale, scale);
    check.norm_type = norm_type;
    check.max_norm = max_norm;
    check.wide = wide;
    if (max_norm_tensor) {
      const Name name = {"max_norm"};
      need_device(op, name, *max_norm_tensor, {"scale"}, scale);
      check.max_norm_dtype = dtype_of(op, name, *max_norm_tensor);
      if (max_norm_tensor->numel() != 1)
        fail(op, name, " has shape ", list_text(max_norm_tensor->sizes()), "; expected one element");
      check.max_norm_tensor = data_of(op, name, *max_norm_tensor);
    }
    const auto fresh = [&](ScalarType dtype) { return torch::stable::new_empty(scale, {}, dtype); };
    const Tensor inv_scale = fresh(ScalarType::Float), clip_coef = fresh(ScalarType::Float),
                 found_inf = fresh(ScalarType::Float), norm = fresh(wide ? ScalarType::Double : ScalarType::Float),
                 counts = torch::stable::new_empty(scale, {static_cast<int64_t>(grads.size()), 3}, ScalarType::Long);
    check.inv_scale = data<float>(inv_scale);
    check.clip_coef = data<float>(clip_coef);
    check.found_inf = data<float>(found_inf);
    check.norm = norm.data_ptr();
    check.counts = data<int64_t>(counts);
    Backend(scale).check_grads(grads, check, per_tensor, numerics);
    return {inv_scale, clip_coef, found_inf, norm, counts};
  }
};

}  // namespace fusedamp
