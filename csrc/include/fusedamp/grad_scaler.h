// The loss scaler: torch.amp.GradScaler's interface, with every decision made on the device.
#pragma once
#include <torch/optim/lbfgs.h>
#include <torch/serialize/input-archive.h>
#include <torch/serialize/output-archive.h>

#include "gradient_checks.h"

namespace fusedamp {

// Scales losses so that gradients of any dtype neither overflow nor vanish, as torch.amp.GradScaler does in Python.
//
// Arguments, errors and scale updates are those of fusedamp.GradScaler in Python. With an optimizer of fusedamp::optim,
// step() checks the gradients and passes 1/scale, the clip coefficient and the overflow flag to one fused step. This
// never waits for the device, and *leaves the gradients scaled* (call unscale_() first to read them). Any other
// torch::optim::Optimizer, and a subclass of fusedamp's that overrides step(), gets unscaled, clipped gradients, and is
// called only if the host reads no overflow.
//
// If any gradient of an optimizer is not finite before or after unscaling, its step changes nothing. The scale lives on
// the device of the first loss. A scaler can be moved, not copied; torch::save and torch::load keep its state.
//
// Throws c10::ValueError for options, arguments and states that can't be used, c10::Error for calls out of order.
class GradScaler : detail::GradientChecks {
 public:
  using Optimizer = torch::optim::Optimizer;

  explicit GradScaler(GradScalerOptions options = {}) : GradientChecks(std::move(options)) {}

  // Multiplies by the scale. A disabled scaler returns `outputs` itself.
  at::Tensor scale(const at::Tensor& outputs) { return is_enabled() ? scale_.scaled(outputs) : outputs; }
  std::vector<at::Tensor> scale(std::vector<at::Tensor> outputs) {
    for (at::Tensor& output : outputs) output = scale(output);
    return outputs;
  }

  // Divides the gradients by the scale in place, and applies a deferred clipping. Uncoalesced sparse gradients and
  // expanded gradients are replaced; all others are modified in place. Once per optimizer and iteration.
  void unscale_(const Optimizer& optimizer) {
    if (!is_enabled()) return;
    scale_.need("unscale_");
    PerOptimizer& its = of(optimizer);
    if (its.stage == Stage::unscaled)
      detail::refuse("unscale_() has already been called on this optimizer since the last update().");
    if (its.stage == Stage::stepped) detail::refuse("unscale_() is being called after step().");
    unscale_now(optimizer, its);
  }

  // Clips the unscaled gradients of `optimizer` by their total norm; returns this norm without waiting.
  //
  // With a fusedamp optimizer and scaled gradients, this only reads the gradients. The clipping is deferred to the
  // step, which reuses the gradient check, or to unscale_(), if that is called first. If gradients or scale change in
  // between, according to each gradient's identity and version counter, the step checks and clips again. With any
  // other optimizer, or after unscale_(), the gradients are unscaled if necessary and clipped in place.
  //
  // max_norm: a number >= 0, or a tensor of 1 element that is read on the device. norm_type: p of the p-norm, >= 0, or
  // INFINITY. Returns the norm as fusedamp::clip_grad_norm_ does; inf or NaN if this step is an overflow.
  template <class MaxNorm>
  at::Tensor clip_grad_norm_(const Optimizer& optimizer, const MaxNorm& max_norm, double norm_type = 2.0) {
    return clip(optimizer, detail::checked_clip("GradScaler.clip_grad_norm_", max_norm, norm_type));
  }

  // Steps `optimizer` if all gradients are finite; returns what its step() returned, and an undefined tensor for a
  // fused or skipped step. Once per optimizer and iteration. A fused step is always called and skips on the device:
  // last_step_skipped() tells if it did. An enabled scaler takes no closure.
  at::Tensor step(Optimizer& optimizer, const Optimizer::LossClosure& closure = nullptr) {
    if (!is_enabled()) return optimizer.step(closure);
    if (closure) detail::refuse("Closure use is not currently supported if GradScaler is enabled.");
    scale_.need("step");
    PerOptimizer& its = of(optimizer);
    if (its.stage == Stage::stepped) detail::refuse("step() has already been called since the last update().");
    if (dynamic_cast<torch::optim::LBFGS*>(&optimizer))
      detail::refuse(
          "[GradScaler.step] LBFGS needs a closure, which computes loss and gradients several times per step; expected "
          "an optimizer that steps without one. Use another optimizer, or LBFGS with a disabled GradScaler.");
    at::Tensor loss;
    if (is_fused(optimizer))
      step_fused(static_cast<optim::FusedOptimizer&>(optimizer), its);
    else
      loss = step_on_host(optimizer, its);
    its.stage = Stage::stepped;
    its.forget_checks();
    return loss;
  }

  // Updates the scale in place for the next iteration, from the overflow flags of the steps. An iteration in which only
  // fused optimizers without gradients stepped leaves the scale unchanged.
  void update() {
    if (!is_enabled()) return;
    scale_.need("update");
    const bool stuck = move_scale();
    end_iteration();
    if (stuck) complain_about_floor();
  }
  // Sets the scale to a finite number > 0 or a tensor of 1 element, clamped to min_scale..max_scale. Any other number
  // is refused. A tensor on an accelerator is checked there: if its value is not finite or not > 0, the scale stays.
  template <class Scale>
  void update(const Scale& new_scale) {
    if (!is_enabled()) return;
    scale_.need("update");
    const detail::Lasting guard;
    scale_.set(new_scale);
    end_iteration();
  }

  // The scale; waits for the device. 1 if the scaler is disabled.
  double get_scale() const { return scale_.value(); }
  bool is_enabled() const { return scale_.is_enabled(); }
  double get_growth_factor() const { return scale_.options().growth_factor(); }
  void set_growth_factor(double new_factor) { scale_.set_growth_factor(new_factor); }
  double get_backoff_factor() const { return scale_.options().backoff_factor(); }
  void set_backoff_factor(double new_factor) { scale_.set_backoff_factor(new_factor); }
  int64_t get_growth_interval() const { return scale_.options().growth_interval(); }
  void set_growth_interval(int64_t new_interval) { scale_.set_growth_interval(new_interval); }

  // True if the latest step() was skipped: a 0-d bool tensor on the scale's device; no wait. Replays of a CUDA graph
  // that captured the step update its source.
  at::Tensor last_step_skipped() const {
    return last_found_inf_.defined() ? last_found_inf_ != 0 : at::zeros({}, at::kBool);
  }

  // The latest overflow of any optimizer, or of `optimizer`: the step and, per parameter, the number of inf, NaN and
  // too large elements. Waits for the device. Gradients unscaled by an explicit unscale_() on CUDA are counted only
  // now, so call this before zero_grad(); in-place clipping has turned their inf into NaN.
  OverflowReport overflow_report() {
    const detail::Lasting guard;
    OverflowReport latest;
    for (const auto& its : optimizers_) {
      OverflowReport report = its->log && !its->has_ended() ? its->log->report() : OverflowReport();
      if (report.step > latest.step) latest = std::move(report);
    }
    return latest;
  }
  OverflowReport overflow_report(const Optimizer& optimizer) {
    const detail::Lasting guard;
    PerOptimizer& its = of(optimizer);
    return its.log ? its.log->report() : OverflowReport();
  }

  // torch's five entries in Python, "_hysteresis_tracker" if the hysteresis is more than 1, and with the policy
  // "headroom" its state, "_headroom". Numbers and lists of numbers; empty if the scaler is disabled. Waits for the
  // device.
  c10::IValue state_dict() const { return scale_.state_dict(); }

  // Loads a state of this scaler, or of fusedamp's or torch's in Python. Its scale is clamped to min_scale..max_scale,
  // which are not part of a state. Without "_headroom", that policy starts from scratch. A state that can't be used is
  // refused, and then nothing is changed.
  void load_state_dict(const c10::IValue& state_dict) {
    const detail::Lasting guard;
    scale_.load(state_dict);
  }

  void save(torch::serialize::OutputArchive& archive) const { archive.write("state_dict", state_dict()); }
  void load(torch::serialize::InputArchive& archive) {
    load_state_dict(optim::detail::read_state_dict(archive, "GradScaler"));
  }

 private:
  void step_fused(optim::FusedOptimizer& optimizer, PerOptimizer& its) {
    const detail::Lasting guard;
    if (has_current_check(optimizer, its)) return step_checked(optimizer, its);
    const bool unscaled = its.stage != Stage::ready;
    if (!unscaled) {
      renew_parts(optimizer, its);
      if (!its.parts) check_by_parts(optimizer, its, 2.0);
    }
    const at::Tensor flag = begin_step(optimizer, its);
    detail::OverflowLog& log = log_of(optimizer, its);
    if (!unscaled)
      log.record(optimizer, its.parts->gradients, its.parts->stats, flag);
    else if (!flag.is_cpu())
      log.record_uncounted(optimizer, flag);
    else if (flag.item<float>() != 0)
      record_now(optimizer, its);
    detail::ByDevice<detail::StepInputs> inputs;
    for (const at::Tensor& grad : detail::gradients_of(detail::params_of(optimizer)))
      inputs.of(grad.device()).found_inf = flag;
    for (auto& [device, here] : inputs) {
      here.found_inf = detail::on(flag, device);
      if (!unscaled) here.inv_scale = detail::on(its.parts->inv_scale, device);
      if (!unscaled && its.parts->clip_coef.defined())
        here.clip_coef = detail::on(its.parts->clip_coef.to(at::kFloat), device);
    }
    optimizer.step_with(inputs);
  }

  void step_checked(optim::FusedOptimizer& optimizer, PerOptimizer& its) {
    const detail::Check& check = *its.check;
    last_found_inf_ = check.found.found_inf;
    detail::OverflowLog& log = log_of(optimizer, its);
    const auto& record = log.record_of(optimizer, check.positions, check.found.counts);
    const detail::StepInputs inputs = {
        check.found.inv_scale, check.clip_coef(), check.found.found_inf, check.found.counts, record.counts,
        record.step,           log.steps()};
    if (optimizer.step_with({{scale_.tensor().device(), inputs}})) return;
    log.next_step();
    log.record(optimizer, check.positions, check.found.counts, check.found.found_inf);
  }

  at::Tensor step_on_host(Optimizer& optimizer, PerOptimizer& its) {
    if (its.stage == Stage::ready) unscale_now(optimizer, its);
    if (its.found_inf.empty() && !dynamic_cast<optim::FusedOptimizer*>(&optimizer))
      detail::refuse("No inf checks were recorded for this optimizer.");
    {
      const detail::Lasting guard;
      if (begin_step(optimizer, its).item<float>() != 0) {
        record_now(optimizer, its);
        return {};
      }
    }
    return optimizer.step();
  }

  void complain_about_floor() {
    const GradScalerOptions& options = scale_.options();
    if (warned_ && options.on_floor() == "warn") return;
    warned_ = true;
    const std::string message = detail::text(
        "[GradScaler] gradients overflow with the scale at its floor (min_scale ", detail::repr(options.min_scale()),
        "), and every such step is skipped. The loss or the model is not finite, or min_scale is too big. ",
        "Latest overflow: ", overflow_report().str());
    if (options.on_floor() == "raise") detail::refuse(message);
    TORCH_WARN(message);
  }

  bool warned_ = false;
};

inline torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive, const GradScaler& scaler) {
  scaler.save(archive);
  return archive;
}
inline torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive, GradScaler& scaler) {
  scaler.load(archive);
  return archive;
}

}  // namespace fusedamp
