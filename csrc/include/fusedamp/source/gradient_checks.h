// Gradient checks of a loss scaler: one result per optimizer, kept until the step.
#pragma once
#include <memory>

#include "check.h"
#include "loss_scale.h"
#include "overflow_log.h"

namespace fusedamp::detail {

struct GradientChecks {
  using Optimizer = torch::optim::Optimizer;

  explicit GradientChecks(GradScalerOptions options) : scale(std::move(options)) { check_version(); }

  enum class Stage { ready, unscaled, stepped };

  // What is known of one optimizer: of this iteration, and of all.
  struct PerOptimizer {
    PerOptimizer(const Optimizer& optimizer, const void* key) : key(key) {
      if (const auto* fusedamps = dynamic_cast<const optim::FusedOptimizer*>(&optimizer))
        token = fusedamps->token();
      else if (const Tensors params = params_of(optimizer); !params.empty())
        param = WeakTensor(params[0].getIntrusivePtr());
    }

    const void* key;
    Stage stage = Stage::ready;
    PerDevice found_inf, largest;
    std::optional<Check> check;  // one of these until the step
    std::optional<CheckByParts> parts;
    std::optional<OverflowLog> log;
    LargestGradient reader;

    // Whether the optimizer is known to be gone. A fusedamp optimizer has a token. Others have a parameter, which they
    // may replace: what is known of the present iteration is kept.
    bool has_ended() const {
      if (token) return token->expired();
      return param && param->use_count() == 0 && stage == Stage::ready;
    }

    void forget_checks() {
      check.reset();
      parts.reset();
    }
    void end_iteration() {
      forget_checks();
      stage = Stage::ready;
      found_inf.clear();
      largest.clear();
    }

   private:
    std::optional<std::weak_ptr<void>> token;
    std::optional<WeakTensor> param;
  };

  // Whether step() is fusedamp's own, which takes scaled gradients.
  static bool is_fused(const Optimizer& optimizer) {
    const auto* fusedamps = dynamic_cast<const optim::FusedOptimizer*>(&optimizer);
    return fusedamps && fusedamps->has_own_step();
  }

  PerOptimizer& of(const Optimizer& optimizer) {
    const void* key = &optimizer.defaults();  // they move with the optimizer
    for (auto& its : optimizers)
      if (its->key == key && !its->has_ended()) return *its;
    return *optimizers.emplace_back(std::make_unique<PerOptimizer>(optimizer, key));
  }

  LargestGradient* reader(PerOptimizer& its) { return scale.follows_gradients() ? &its.reader : nullptr; }

  OverflowLog& log_of(const Optimizer& optimizer, PerOptimizer& its) {
    if (!its.log) its.log.emplace(optimizer, scale.tensor().device());
    return *its.log;
  }

  void unscale_now(const Optimizer& optimizer, PerOptimizer& its) {
    const Lasting guard;
    renew_parts(optimizer, its);
    const Tensor inv_scale = inverse_of(scale.tensor());
    const Gradients gradients(params_of(optimizer));
    if (reader(its)) {
      gradients.stats(inv_scale, 2.0, reader(its));
      its.largest = its.reader.take();
    }
    PerDevice flags;
    for (const auto& [device, bucket] : gradients.by_device)
      unscale_(bucket.tensors, on(inv_scale, device), flags.of(device) = no_overflow(device));
    gradients.write_back();
    if (its.parts && its.parts->clip_coef.defined()) Gradients(params_of(optimizer)).multiply_(its.parts->clip_coef);
    its.forget_checks();
    its.found_inf = std::move(flags);
    its.stage = Stage::unscaled;
  }

  Tensor clip(const Optimizer& optimizer, const Clip& by) {
    if (scale.is_enabled()) {
      scale.need("clip_grad_norm_");
      PerOptimizer& its = of(optimizer);
      if (its.stage == Stage::stepped) refuse("clip_grad_norm_() is being called after step().");
      if (its.stage == Stage::ready) {
        if (is_fused(optimizer)) return clip_later(optimizer, its, by);
        unscale_now(optimizer, its);
      }
    }
    return clip_now(params_of(optimizer), by);
  }

  Tensor clip_later(const Optimizer& optimizer, PerOptimizer& its, const Clip& by) {
    const Lasting guard;
    if (!its.check && !its.parts && check_at_once(optimizer, its, by)) return its.check->found.norm;
    renew_parts(optimizer, its);
    return clip_parts(optimizer, its, by);
  }

  bool check_at_once(const Optimizer& optimizer, PerOptimizer& its, const std::optional<Clip>& by) {
    its.check = detail::check_at_once(params_of(optimizer), scale.tensor(), by, reader(its));
    if (!its.check) return false;
    if (reader(its)) its.largest = its.reader.take();
    its.found_inf.clear();
    its.found_inf.of(scale.tensor().device()) = its.check->found.found_inf;
    return true;
  }

  void check_by_parts(const Optimizer& optimizer, PerOptimizer& its, double norm_type) {
    its.parts.emplace(detail::check_by_parts(params_of(optimizer), scale.tensor(), norm_type, reader(its)));
    if (reader(its)) its.largest = its.reader.take();
    its.found_inf = its.parts->flags();
  }

  Tensor clip_parts(const Optimizer& optimizer, PerOptimizer& its, const Clip& by) {
    if (!its.parts || its.parts->norm_type != by.norm_type) {
      const std::optional<CheckByParts> earlier = std::exchange(its.parts, std::nullopt);
      check_by_parts(optimizer, its, by.norm_type);
      if (earlier) its.parts->clips = earlier->clips, its.parts->clip_coef = earlier->clip_coef;
    }
    return its.parts->add(by);
  }

  bool still_holds(const Optimizer& optimizer, const Stamp& stamp) {
    return stamp.matches(with_scale(scale.tensor(), gradients_of(params_of(optimizer))));
  }

  // Turns an earlier check into one by parts, with its clipping; repeats it if gradients or scale changed.
  void renew_parts(const Optimizer& optimizer, PerOptimizer& its) {
    if (!its.check && (!its.parts || still_holds(optimizer, its.parts->stamp))) return;
    std::vector<Clip> clips;
    if (its.parts) clips = its.parts->clips;
    if (its.check && its.check->clip) clips = {*its.check->clip};
    its.forget_checks();
    for (const Clip& by : clips) clip_parts(optimizer, its, by);
  }

  // The check for this step by one op: that of an earlier clipping if it is still valid.
  bool has_current_check(const Optimizer& optimizer, PerOptimizer& its) {
    if (its.stage != Stage::ready || its.parts) return false;
    if (!its.check) return check_at_once(optimizer, its, std::nullopt);
    if (still_holds(optimizer, its.check->stamp)) return true;
    std::optional<Check> earlier = std::exchange(its.check, std::nullopt);
    if (check_at_once(optimizer, its, earlier->clip)) return true;
    its.check = std::move(earlier);  // the check by parts applies its deferred clipping
    return false;
  }

  // Combines the flags of all devices, and starts the step in the overflow log.
  Tensor begin_step(const Optimizer& optimizer, PerOptimizer& its) {
    Tensors flags;
    append(flags, its.found_inf);
    last_found_inf = combine(flags, scale.tensor().device());
    log_of(optimizer, its).next_step();
    return last_found_inf;
  }

  void record_now(const Optimizer& optimizer, PerOptimizer& its) {
    const Gradients gradients(params_of(optimizer));
    its.log->record(optimizer, gradients, gradients.stats(), last_found_inf);
  }

  // Moves the scale by what all optimizers found; true if an overflow at the floor was detected.
  bool move_scale() {
    const Lasting guard;
    Tensors flags, largest;
    bool stepped = false;
    for (const auto& its : optimizers) {
      append(flags, its->found_inf);
      append(largest, its->largest);
      stepped = stepped || its->stage == Stage::stepped;
    }
    if (flags.empty() && !stepped) refuse("No inf checks were recorded prior to update.");
    if (flags.empty()) return false;  // no optimizer had a gradient
    const c10::Device device = scale.tensor().device();
    return scale.move(combine(flags, device), scale.follows_gradients() ? largest_on(largest, device) : Tensor());
  }

  void end_iteration() {
    for (auto& its : optimizers) its->end_iteration();
    const auto has_ended = [](const auto& its) { return its->has_ended(); };
    optimizers.erase(std::remove_if(optimizers.begin(), optimizers.end(), has_ended), optimizers.end());
  }

  LossScale scale;
  std::vector<std::unique_ptr<PerOptimizer>> optimizers;
  Tensor last_found_inf;
};

}  // namespace fusedamp::detail
