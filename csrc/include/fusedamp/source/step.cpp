// What a step of FusedOptimizer does: look, prepare if anything has changed, launch.
#include "../optimizer.h"

#include <cmath>
#include <unordered_map>
#include <unordered_set>

#include "fields.h"
#include "mode.h"
#include "plan.h"

namespace fusedamp::optim {
namespace detail {
namespace {

// A learning rate that is a tensor, where the op can read it; undefined for a number, which goes to `lr`.
Tensor rate_on(Options& options, c10::Device device, double& lr) {
  const Tensor& rate = options.rate_tensor();
  lr = 0.0;
  if (!rate.defined()) lr = options.get_lr();
  if (!rate.defined() || rate.device() == device) return rate.defined() ? rate.detach() : rate;
  if (rate.is_cpu()) {
    lr = rate.item<double>();  // waits for nothing
    return {};
  }
  return rate.detach().to(device);
}

}  // namespace
}  // namespace detail

bool FusedOptimizer::step_with(const detail::DeviceInputs& inputs) {
  const detail::StepMode mode;
  const auto modes = check_options();
  if (!plan_->matches(param_groups_, modes, state_)) {
    plan_->forget();
    drop_orphans();
    auto slots = slots_of(modes, true);
    prepare(slots, modes, inputs);
    launch(modes, inputs);
    for (const auto& slot : slots)
      if (slot.is_copy()) slot.param.copy_(slot.dense);
  } else {
    launch(modes, inputs);
  }
  return inputs.size() == 1;
}

void FusedOptimizer::launch(const std::vector<detail::GroupMode>& modes, const detail::DeviceInputs& inputs) {
  std::vector<detail::Tensor> rates;  // that are read on a device
  plan_->set_numbers([&](size_t g, c10::Device device, StepGroup& group) {
    Options& now = options(g);
    const auto hyper = detail::hyper_of(now, modes[g].op);
    std::copy(hyper.begin(), hyper.end(), group.hyper);
    const detail::Tensor rate = detail::rate_on(now, device, group.lr);
    if (rate.defined() && rate.scalar_type() != c10::kFloat && rate.scalar_type() != c10::kDouble)
      detail::refuse_value(detail::text("[", modes[g].op, "] lr is ", detail::name_of(rate.scalar_type()), " of shape ",
                                        detail::list_text(rate.sizes()), " on ", rate.device().str(),
                                        "; expected one float32 or float64 element on ", device.str()));
    group.lr_tensor = detail::address_of(rate);
    group.lr_dtype = rate.defined() ? detail::dtype_code(rate.scalar_type()) : DType::f32;
    if (rate.defined()) rates.push_back(rate);
  });
  std::vector<detail::StepInputs> here;
  plan_->each([&](const auto&, const auto&, const auto&, const auto&, const auto&, c10::Device device) {
    here.push_back(inputs_on(inputs, device));
  });
  size_t t = 0;
  plan_->each([&](const std::string& op, const auto& rows, const auto& grads, const auto& groups, const auto& like,
                  c10::Device) { detail::planned_step(op, rows, grads, groups, like, here[t++]); });
  plan_->bump_versions();
}

detail::StepInputs FusedOptimizer::inputs_on(const detail::DeviceInputs& inputs, c10::Device device) const {
  if (inputs.empty()) return {};
  std::vector<std::string> known;
  for (const auto& [where, found] : inputs) {
    if (where == device) return found;
    known.push_back("'" + where.str() + "'");
  }
  detail::refuse(detail::text("[GradScaler.step] the optimizer has gradients on ", device.str(), "; expected only ",
                              detail::list_text(known),
                              ", where the scaler looked for overflows. Don't add gradients between unscale_ and "
                              "step."));
}

std::vector<detail::GroupMode> FusedOptimizer::check_options() {
  own_defaults();
  std::vector<detail::GroupMode> modes;
  modes.reserve(param_groups_.size());
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    Options& now = options(g);
    now.check(where(g));
    seed(now);
    modes.push_back(detail::mode_of(now));
  }
  return modes;
}

// Forgets the states of parameters that no longer exist.
void FusedOptimizer::drop_orphans() {
  for (auto it = state_.begin(); it != state_.end();) {
    const auto* state = dynamic_cast<detail::ParamState*>(it->second.get());
    it = state && state->owner.expired() ? state_.erase(it) : std::next(it);
  }
}

// The parameters that take part, with their gradients if they have one.
std::vector<detail::Slot> FusedOptimizer::slots_of(const std::vector<detail::GroupMode>& modes,
                                                   bool only_with_gradient) const {
  std::vector<detail::Slot> slots;
  std::unordered_set<const c10::TensorImpl*> seen;
  int64_t position = 0;  // of a group's first parameter in the optimizer
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    const auto& params = param_groups_[g].params();
    const Options& now = options(g);
    for (size_t i = 0; i < params.size(); ++i) {
      detail::Slot slot;
      slot.param = params[i];
      slot.group = g;
      slot.index = static_cast<int64_t>(i);
      slot.seed = (modes[g].storage.seed.value_or(0) << 32) + position + slot.index;
      detail::Tensor grad = slot.param.grad();
      if (!grad.defined() && only_with_gradient) continue;
      detail::within(
          [&] { return where(slot); },
          [&] {
            if (!seen.insert(slot.param.unsafeGetTensorImpl()).second)
              detail::refuse_value("is in the optimizer twice; expected it once. Remove the second.");
            if (grad.defined() && grad.layout() != c10::kStrided) {
              if (!now.takes_sparse())
                detail::refuse(name_ + " does not support sparse gradients, please consider SparseAdam instead");
              grad = grad.to_dense();
            }
            detail::wide_dtype(slot.param);
            detail::check_place(slot.param);
            slot.format = detail::format_of(slot.param, modes[g].storage, modes[g].tensors > 0);
            slot.grad = grad;
          });
      slots.push_back(std::move(slot));
    }
    position += static_cast<int64_t>(params.size());
  }
  return slots;
}

// Makes missing states, and brings others into the options' formats: the same one of all parameters after another, so
// that what a step reads in turn lies side by side.
void FusedOptimizer::complete(std::vector<detail::Slot>& slots) {
  const auto& specs = own_defaults().states();
  const auto each = [&](const auto& body) {
    for (auto& slot : slots) detail::within([&] { return where(slot); }, [&] { body(slot); });
  };
  each([&](detail::Slot& slot) {
    auto& entry = state_[slot.param.unsafeGetTensorImpl()];
    auto* known = dynamic_cast<detail::ParamState*>(entry.get());
    if (!known || known->owner.expired()) {
      auto made = std::make_unique<detail::ParamState>(slot.param);
      known = made.get();
      entry = std::move(made);
    }
    slot.state = known;
    if (!known->step.defined() && detail::is_capturing(slot.param))
      detail::refuse(
          "has no optimizer state yet; expected it before graph capture, as a replay would reset it. Run one step "
          "before "
          "capturing.");
    detail::keep_step(*known, slot.param);
  });
  for (size_t s = 0; s < specs.size(); ++s)
    each([&](detail::Slot& slot) {
      if (!options(slot.group).uses(s)) return;
      if (slot.state->states[s].defined()) {
        detail::adapt_state(*slot.state, s, slot.param, specs[s], slot.format);
        return;
      }
      if (specs[s].restarts) slot.state->step.zero_();
      detail::fill_state(*slot.state, s, slot.param, specs[s], own_defaults().first(s), slot.format);
    });
  each([&](detail::Slot& slot) {
    if (slot.format.has_master) detail::keep_master(*slot.state, slot.param, slot.format);
  });
}

void FusedOptimizer::create_states() {
  const detail::StepMode mode;
  const auto modes = check_options();
  std::vector<detail::Slot> slots;
  for (size_t g = 0; g < param_groups_.size(); ++g)
    for (const auto& param : param_groups_[g].params())
      if (!param.is_cpu() && !param.is_cuda()) return;  // the first step refuses it, or it is moved until then
  slots = slots_of(modes, false);
  complete(slots);
}

std::vector<detail::Batch> FusedOptimizer::batches_of(const std::vector<detail::Slot>& slots) const {
  std::vector<detail::Batch> batches;
  for (const auto& slot : slots) {
    const bool has_master = slot.format.has_master;
    auto found = std::find_if(batches.begin(), batches.end(), [&](const detail::Batch& batch) {
      return batch.group == slot.group && batch.has_masters == has_master &&
             batch.slots[0]->param.device() == slot.param.device();
    });
    if (found == batches.end()) found = batches.insert(found, {slot.group, has_master, {}});
    found->slots.push_back(&slot);
  }
  return batches;
}

// Checks everything, and makes the tables.
void FusedOptimizer::prepare(std::vector<detail::Slot>& slots, const std::vector<detail::GroupMode>& modes,
                             const detail::DeviceInputs& inputs) {
  complete(slots);
  for (auto& slot : slots)
    detail::within([&] { return where(slot); },
                   [&] {
                     slot.dense = slot.param.is_non_overlapping_and_dense()
                                      ? slot.param
                                      : at::empty_like(slot.param).copy_(slot.param);
                     slot.target = detail::as_real(slot.dense);
                     slot.grad = detail::paired(slot, slot.grad);
                   });
  detail::check_aliasing(name_, slots);
  const auto batches = batches_of(slots);
  const auto add_numbers = [&](const detail::Batch& batch, detail::StepLists& lists) {
    Options& now = options(batch.group);
    lists.hyper = detail::hyper_of(now, lists.op);
    lists.lr_tensor = detail::rate_on(now, batch.slots[0]->param.device(), lists.lr);
  };
  detail::check_batches(batches, modes, own_defaults().states(), add_numbers,
                        [&](c10::Device device) { return inputs_on(inputs, device); });
  for (auto& slot : slots)  // only now, as a step that is refused must not lose masters
    if (!slot.format.has_master) slot.state->master.reset();
  plan_->make(batches, modes, param_groups_);
}

}  // namespace fusedamp::optim
