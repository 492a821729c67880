// The loss scale: initialization, scaling, updates and checkpoints. grad_scaler.h has what involves optimizers.
#pragma once
#include "floor.h"
#include "limits.h"

namespace fusedamp::detail {

class LossScale {
 public:
  explicit LossScale(GradScalerOptions options) : options_(std::move(options)), init_scale_(options_.init_scale()) {
    check_options(options_);
    if (options_.policy() == "headroom") headroom_.emplace(options_.headroom_bits());
  }

  bool is_enabled() const { return options_.enabled(); }
  const Tensor& tensor() const { return scale_; }

  Tensor scaled(const Tensor& outputs) {
    if (!outputs.defined()) refuse_value("outputs must be a Tensor or an iterable of Tensors");
    if (!scale_.defined()) place(outputs);
    return outputs * on(scale_, outputs.device());
  }

  // The scale, for a method of this name.
  const Tensor& need(const char* method) const {
    if (!scale_.defined())
      refuse(text("Attempted ", method, " but _scale is None.  This may indicate your script did not use ",
                  "scaler.scale(loss or outputs) earlier in the iteration."));
    return scale_;
  }

  double value() const { return !is_enabled() ? 1.0 : scale_.defined() ? scale_.item<double>() : init_scale_; }

  // The next scale after all steps of an iteration; true if an overflow at the floor was detected.
  bool move(const Tensor& found_inf, const Tensor& largest) {
    const ScaleRule rule = {options_.growth_factor(),
                            options_.backoff_factor(),
                            options_.growth_interval(),
                            options_.min_scale(),
                            options_.max_scale(),
                            options_.hysteresis(),
                            options_.hysteresis_refill() == "good_step"};
    const double backoff = headroom_ ? Headroom::kLargestBackoff : rule.backoff_factor;
    const bool stuck = floor_.stuck(scale_, found_inf, rule.min_scale, backoff);
    if (headroom_)
      headroom_->update(scale_, found_inf, largest, rule);
    else
      update_scale_(scale_, growth_tracker_, hysteresis_tracker_, found_inf, rule);
    return stuck;
  }

  void set(double value) {
    scale_.fill_(clamped(checked_scale("new_scale", value)));
    floor_.forget();
  }

  // On an accelerator, a value that is not finite or not > 0 leaves the scale as it is.
  void set(const Tensor& value) {
    if (!value.defined() || value.device().type() != scale_.device().type() || value.numel() != 1 ||
        value.requires_grad())
      refuse(
          "new_scale should be a float or a 1-element torch.cuda.FloatTensor or "
          "torch.FloatTensor with requires_grad=False.");
    if (value.is_cpu()) checked_scale("new_scale", c10::IValue(value));
    const Tensor wanted = value.reshape({}).to(scale_.options());
    const Tensor bounded = wanted.clamp(options_.min_scale(), options_.max_scale());
    scale_.copy_(at::where(wanted.isfinite() & (wanted > 0), bounded, scale_));
    floor_.forget();
  }

  const GradScalerOptions& options() const { return options_; }
  void set_growth_factor(double factor) {
    checked_growth_factor(factor);
    if (headroom_) need_unused_factors(factor, 0.5);
    options_.growth_factor(factor);
  }
  void set_backoff_factor(double factor) {
    checked_backoff_factor(factor);
    if (headroom_) need_unused_factors(2.0, factor);
    options_.backoff_factor(factor);
  }
  void set_growth_interval(int64_t interval) { options_.growth_interval(checked_interval(interval)); }

  c10::IValue state_dict() const {
    Dict state = new_dict();
    if (!is_enabled()) return state;
    state.insert("scale", value());
    state.insert("growth_factor", options_.growth_factor());
    state.insert("backoff_factor", options_.backoff_factor());
    state.insert("growth_interval", options_.growth_interval());
    state.insert("_growth_tracker", count_in(growth_tracker_, init_growth_tracker_));
    if (options_.hysteresis() > 1)
      state.insert("_hysteresis_tracker",
                   count_in(hysteresis_tracker_, init_hysteresis_tracker_.value_or(options_.hysteresis())));
    if (headroom_) {
      List numbers = new_list();  // Python reads no list of a type
      for (const int64_t number : headroom_->save()) numbers.push_back(number);
      state.insert("_headroom", numbers);
    }
    return state;
  }

  void load(const c10::IValue& state_dict) {
    if (!is_enabled()) return;
    const ScalerState state = checked_state(state_dict, headroom_.has_value());
    init_scale_ = clamped(state.scale);
    init_growth_tracker_ = state.growth_tracker;
    init_hysteresis_tracker_ = state.hysteresis_tracker;
    if (init_hysteresis_tracker_)
      *init_hysteresis_tracker_ = std::min(*init_hysteresis_tracker_, options_.hysteresis());
    options_.growth_factor(state.growth_factor).backoff_factor(state.backoff_factor);
    options_.growth_interval(state.growth_interval);
    if (scale_.defined()) scale_.fill_(init_scale_);
    if (growth_tracker_.defined()) growth_tracker_.fill_(init_growth_tracker_);
    if (hysteresis_tracker_.defined())
      hysteresis_tracker_.fill_(init_hysteresis_tracker_.value_or(options_.hysteresis()));
    if (headroom_) headroom_->load(state.headroom);
    floor_.forget();
  }

  bool follows_gradients() const { return headroom_.has_value(); }

 private:
  double clamped(double value) const { return std::min(std::max(value, options_.min_scale()), options_.max_scale()); }

  static int64_t count_in(const Tensor& tracker, int64_t initial) {
    return tracker.defined() ? tracker.item<int64_t>() : initial;
  }

  // Makes everything that lies on the device at once: a graph that captured it would reset it in each replay.
  void place(const Tensor& loss) {
    if (is_capturing(loss))
      refuse(
          "[GradScaler.scale] the scale is not on the device yet; expected it before graph capture, as each replay "
          "would reset it. Call scaler.scale() once before capturing.");
    const Lasting guard;
    const c10::Device device = loss.device();
    scale_ = at::full({}, init_scale_, detail::options(device, at::kFloat));
    growth_tracker_ = at::full({}, init_growth_tracker_, detail::options(device, at::kInt));
    if (options_.hysteresis() > 1)
      hysteresis_tracker_ =
          at::full({}, init_hysteresis_tracker_.value_or(options_.hysteresis()), detail::options(device, at::kInt));
    if (headroom_) headroom_->place(device);
  }

  GradScalerOptions options_;
  double init_scale_;
  int64_t init_growth_tracker_ = 0;
  std::optional<int64_t> init_hysteresis_tracker_;  // none: the full budget
  std::optional<Headroom> headroom_;                // of the policy "headroom"
  FloorWatch floor_;
  Tensor scale_, growth_tracker_, hysteresis_tracker_;  // undefined before the first loss
};

}  // namespace fusedamp::detail
