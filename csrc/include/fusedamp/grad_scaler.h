// The loss scaler: torch.amp.GradScaler's interface, with every decision made on the device.
#pragma once
#include <ATen/core/ivalue.h>
#include <torch/optim/optimizer.h>

#include <memory>
#include <vector>

#include "grad_scaler_options.h"
#include "overflow.h"

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
class GradScaler {
 public:
  using Optimizer = torch::optim::Optimizer;

  explicit GradScaler(GradScalerOptions options = {});
  GradScaler(GradScaler&&) noexcept;
  GradScaler& operator=(GradScaler&&) noexcept;
  ~GradScaler();

  // Multiplies by the scale. A disabled scaler returns `outputs` itself.
  at::Tensor scale(const at::Tensor& outputs);
  std::vector<at::Tensor> scale(std::vector<at::Tensor> outputs);

  // Divides the gradients by the scale in place, and applies a deferred clipping. Uncoalesced sparse gradients and
  // expanded gradients are replaced; all others are modified in place. Once per optimizer and iteration.
  void unscale_(const Optimizer& optimizer);

  // Clips the unscaled gradients of `optimizer` by their total norm; returns this norm without waiting.
  //
  // With a fusedamp optimizer and scaled gradients, this only reads the gradients. The clipping is deferred to the
  // step, which reuses the gradient check, or to unscale_(), if that is called first. If gradients or scale change in
  // between, according to each gradient's identity and version counter, the step checks and clips again. With any
  // other optimizer, or after unscale_(), the gradients are unscaled if necessary and clipped in place.
  //
  // max_norm: a number >= 0, or a tensor of 1 element that is read on the device. norm_type: p of the p-norm, >= 0, or
  // INFINITY. Returns the norm as fusedamp::clip_grad_norm_ does; inf or NaN if this step is an overflow.
  at::Tensor clip_grad_norm_(const Optimizer& optimizer, double max_norm, double norm_type = 2.0);
  at::Tensor clip_grad_norm_(const Optimizer& optimizer, const at::Tensor& max_norm, double norm_type = 2.0);

  // Steps `optimizer` if all gradients are finite; returns what its step() returned, and an undefined tensor for a
  // fused or skipped step. Once per optimizer and iteration. A fused step is always called and skips on the device:
  // last_step_skipped() tells if it did. An enabled scaler takes no closure.
  at::Tensor step(Optimizer& optimizer, const Optimizer::LossClosure& closure = nullptr);

  // Updates the scale in place for the next iteration, from the overflow flags of the steps. An iteration in which only
  // fused optimizers without gradients stepped leaves the scale unchanged.
  void update();
  // Sets the scale to a finite number > 0 or a tensor of 1 element, clamped to min_scale..max_scale. Any other number
  // is refused. A tensor on an accelerator is checked there: if its value is not finite or not > 0, the scale stays.
  void update(double new_scale);
  void update(const at::Tensor& new_scale);

  // The scale; waits for the device. 1 if the scaler is disabled.
  double get_scale() const;
  bool is_enabled() const;
  double get_growth_factor() const;
  void set_growth_factor(double new_factor);
  double get_backoff_factor() const;
  void set_backoff_factor(double new_factor);
  int64_t get_growth_interval() const;
  void set_growth_interval(int64_t new_interval);

  // True if the latest step() was skipped: a 0-d bool tensor on the scale's device; no wait. Replays of a CUDA graph
  // that captured the step update its source.
  at::Tensor last_step_skipped() const;

  // The latest overflow of any optimizer, or of `optimizer`: the step and, per parameter, the number of inf, NaN and
  // too large elements. Waits for the device. Gradients unscaled by an explicit unscale_() on CUDA are counted only
  // now, so call this before zero_grad(); in-place clipping has turned their inf into NaN.
  OverflowReport overflow_report();
  OverflowReport overflow_report(const Optimizer& optimizer);

  // torch's five entries in Python, "_hysteresis_tracker" if the hysteresis is more than 1, and with the policy
  // "headroom" its state, "_headroom". Numbers and lists of numbers; empty if the scaler is disabled. Waits for the
  // device.
  c10::IValue state_dict() const;

  // Loads a state of this scaler, or of fusedamp's or torch's in Python. Its scale is clamped to min_scale..max_scale,
  // which are not part of a state. Without "_headroom", that policy starts from scratch. A state that can't be used is
  // refused, and then nothing is changed.
  void load_state_dict(const c10::IValue& state_dict);

  void save(torch::serialize::OutputArchive& archive) const;
  void load(torch::serialize::InputArchive& archive);

 private:
  struct Impl;
  Impl& impl() const;

  std::unique_ptr<Impl> impl_;
};

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive, const GradScaler& scaler);
torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive, GradScaler& scaler);

}  // namespace fusedamp
