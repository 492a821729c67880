// The loss scaler: torch.amp.GradScaler's interface, with every decision made on the device.
#include "../grad_scaler.h"

#include <torch/optim/lbfgs.h>

#include "archive.h"
#include "gradient_checks.h"

namespace fusedamp {

struct GradScaler::Impl : detail::GradientChecks {
  using GradientChecks::GradientChecks;

  at::Tensor step(Optimizer& optimizer, PerOptimizer& its) {
    at::Tensor loss;
    if (is_fused(optimizer))
      step_fused(static_cast<optim::FusedOptimizer&>(optimizer), its);
    else
      loss = step_on_host(optimizer, its);
    its.stage = Stage::stepped;
    its.forget_checks();
    return loss;
  }

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
    last_found_inf = check.found.found_inf;
    detail::OverflowLog& log = log_of(optimizer, its);
    const auto& record = log.record_of(optimizer, check.positions, check.found.counts);
    const detail::StepInputs inputs = {
        check.found.inv_scale, check.clip_coef(), check.found.found_inf, check.found.counts, record.counts,
        record.step,           log.steps()};
    if (optimizer.step_with({{scale.tensor().device(), inputs}})) return;
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

  // The next scale, by hand.
  template <class Scale>
  void set_scale(const Scale& new_scale) {
    if (!scale.is_enabled()) return;
    scale.need("update");
    const detail::Lasting guard;
    scale.set(new_scale);
    end_iteration();
  }

  OverflowReport overflow_report() {
    const detail::Lasting guard;
    OverflowReport latest;
    for (const auto& its : optimizers) {
      OverflowReport report = its->log && !its->has_ended() ? its->log->report() : OverflowReport();
      if (report.step > latest.step) latest = std::move(report);
    }
    return latest;
  }

  void complain_about_floor() {
    const GradScalerOptions& options = scale.options();
    if (warned && options.on_floor() == "warn") return;
    warned = true;
    const std::string message = detail::text(
        "[GradScaler] gradients overflow with the scale at its floor (min_scale ", detail::repr(options.min_scale()),
        "), and every such step is skipped. The loss or the model is not finite, or min_scale is too big. ",
        "Latest overflow: ", overflow_report().str());
    if (options.on_floor() == "raise") detail::refuse(message);
    TORCH_WARN(message);
  }

  bool warned = false;
};

GradScaler::GradScaler(GradScalerOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
GradScaler::GradScaler(GradScaler&&) noexcept = default;
GradScaler& GradScaler::operator=(GradScaler&&) noexcept = default;
GradScaler::~GradScaler() = default;

GradScaler::Impl& GradScaler::impl() const {
  if (!impl_)
    detail::refuse("[GradScaler] was moved to another one; expected a scaler with its scale. Use the one that has it.");
  return *impl_;
}

at::Tensor GradScaler::scale(const at::Tensor& outputs) {
  return is_enabled() ? impl().scale.scaled(outputs) : outputs;
}
std::vector<at::Tensor> GradScaler::scale(std::vector<at::Tensor> outputs) {
  for (at::Tensor& output : outputs) output = scale(output);
  return outputs;
}

void GradScaler::unscale_(const Optimizer& optimizer) {
  if (!is_enabled()) return;
  impl().scale.need("unscale_");
  Impl::PerOptimizer& its = impl().of(optimizer);
  if (its.stage == Impl::Stage::unscaled)
    detail::refuse("unscale_() has already been called on this optimizer since the last update().");
  if (its.stage == Impl::Stage::stepped) detail::refuse("unscale_() is being called after step().");
  impl().unscale_now(optimizer, its);
}

at::Tensor GradScaler::clip_grad_norm_(const Optimizer& optimizer, double max_norm, double norm_type) {
  return impl().clip(optimizer, detail::checked_clip("GradScaler.clip_grad_norm_", max_norm, norm_type));
}
at::Tensor GradScaler::clip_grad_norm_(const Optimizer& optimizer, const at::Tensor& max_norm, double norm_type) {
  return impl().clip(optimizer, detail::checked_clip("GradScaler.clip_grad_norm_", max_norm, norm_type));
}

at::Tensor GradScaler::step(Optimizer& optimizer, const Optimizer::LossClosure& closure) {
  if (!is_enabled()) return optimizer.step(closure);
  if (closure) detail::refuse("Closure use is not currently supported if GradScaler is enabled.");
  impl().scale.need("step");
  Impl::PerOptimizer& its = impl().of(optimizer);
  if (its.stage == Impl::Stage::stepped) detail::refuse("step() has already been called since the last update().");
  if (dynamic_cast<torch::optim::LBFGS*>(&optimizer))
    detail::refuse(
        "[GradScaler.step] LBFGS needs a closure, which computes loss and gradients several times per step; expected "
        "an optimizer that steps without one. Use another optimizer, or LBFGS with a disabled GradScaler.");
  return impl().step(optimizer, its);
}

void GradScaler::update() {
  if (!is_enabled()) return;
  impl().scale.need("update");
  const bool stuck = impl().move_scale();
  impl().end_iteration();
  if (stuck) impl().complain_about_floor();
}
void GradScaler::update(double new_scale) { impl().set_scale(new_scale); }
void GradScaler::update(const at::Tensor& new_scale) { impl().set_scale(new_scale); }

double GradScaler::get_scale() const { return impl().scale.value(); }
bool GradScaler::is_enabled() const { return impl().scale.is_enabled(); }
double GradScaler::get_growth_factor() const { return impl().scale.options().growth_factor(); }
void GradScaler::set_growth_factor(double new_factor) { impl().scale.set_growth_factor(new_factor); }
double GradScaler::get_backoff_factor() const { return impl().scale.options().backoff_factor(); }
void GradScaler::set_backoff_factor(double new_factor) { impl().scale.set_backoff_factor(new_factor); }
int64_t GradScaler::get_growth_interval() const { return impl().scale.options().growth_interval(); }
void GradScaler::set_growth_interval(int64_t new_interval) { impl().scale.set_growth_interval(new_interval); }

at::Tensor GradScaler::last_step_skipped() const {
  const at::Tensor& found_inf = impl().last_found_inf;
  return found_inf.defined() ? found_inf != 0 : at::zeros({}, at::kBool);
}

OverflowReport GradScaler::overflow_report() { return impl().overflow_report(); }
OverflowReport GradScaler::overflow_report(const Optimizer& optimizer) {
  const detail::Lasting guard;
  auto& log = impl().of(optimizer).log;
  return log ? log->report() : OverflowReport();
}

c10::IValue GradScaler::state_dict() const { return impl().scale.state_dict(); }
void GradScaler::load_state_dict(const c10::IValue& state_dict) {
  const detail::Lasting guard;
  impl().scale.load(state_dict);
}

void GradScaler::save(torch::serialize::OutputArchive& archive) const { archive.write("state_dict", state_dict()); }
void GradScaler::load(torch::serialize::InputArchive& archive) {
  load_state_dict(detail::read_state_dict(archive, "GradScaler"));
}

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive, const GradScaler& scaler) {
  scaler.save(archive);
  return archive;
}
torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive, GradScaler& scaler) {
  scaler.load(archive);
  return archive;
}

}  // namespace fusedamp
