// The step of all fused optimizers, over groups and devices.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/InferenceMode.h>
#include <torch/serialize/archive.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <typeinfo>

#include "families.h"
#include "plan.h"

namespace fusedamp::optim {
namespace detail {

// What a scaler hands to a step, for each device that has gradients.
using DeviceInputs = std::vector<std::pair<c10::Device, StepInputs>>;

// What save() has written.
inline c10::IValue read_state_dict(torch::serialize::InputArchive& archive, const std::string& name) {
  c10::IValue saved;
  if (!archive.try_read("state_dict", saved))
    refuse_value(
        "[" + name +
        ".load] the archive has no state dict; expected what torch::save wrote of a fusedamp object. Optimizers "
        "of torch::optim save in another form: continue without their states, or bring a state_dict() from "
        "Python.");
  return saved;
}

// Seeds of optimizers that draw random numbers and were given none. torch's generators are not used: results then
// depend on nothing but the order of construction.
inline int64_t next_seed() {
  static std::atomic<int64_t> seeds{0};
  return seeds++ % (int64_t{1} << 31);
}

// Within it tensors outlive inference mode, no graph is built, and ops reach their kernels at once.
struct StepMode {
  c10::InferenceMode off{false};
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView below;
};

}  // namespace detail

// A torch::optim::Optimizer whose step is one op call per device. State is made at the first step. Nothing is written
// if anything is wrong with an option, a parameter or a gradient. No step waits for a device.
class FusedOptimizer : public torch::optim::Optimizer {
 public:
  // Updates all parameters that have a gradient; returns the loss that the closure returned. Throws c10::ValueError
  // naming group and parameter, before anything is updated.
  at::Tensor step(LossClosure closure = nullptr) override {
    at::Tensor loss;
    if (closure) {
      at::AutoGradMode on(true);
      loss = closure();
    }
    step_with({});
    return loss;
  }

  // Adds a group with its own options, which must be of this optimizer's class, or with the defaults. Not virtual in
  // torch: through a reference to torch::optim::Optimizer, torch's method is called, which loses the group's options.
  void add_param_group(const torch::optim::OptimizerParamGroup& group) {
    const size_t index = param_groups_.size();
    auto own = group.has_options() ? group.options().clone() : own_defaults().clone();
    Options& options = need_own_class(*own, index);
    options.check(where(index));
    std::unordered_set<const c10::TensorImpl*> seen;
    for (const at::Tensor& param : group.params())
      if (!param.defined())
        detail::refuse_type(where(index) + " has an undefined tensor; expected parameters. Leave it out.");
      else if (!seen.insert(param.unsafeGetTensorImpl()).second)
        detail::refuse_value(where(index) + " a parameter is given twice; expected it once. Remove the second.");
    for (const auto& other : param_groups_)
      for (const at::Tensor& param : other.params())
        if (seen.count(param.unsafeGetTensorImpl()))
          detail::refuse_value("some parameters appear in more than one parameter group");
    seed(options);
    torch::optim::Optimizer::add_param_group(torch::optim::OptimizerParamGroup(group.params()));
    param_groups_.back().set_options(std::move(own));
  }

  // The state of a parameter under Python's names: "step", "exp_avg", "exp_avg_scale", "master" ... The tensors are the
  // optimizer's own and may be written. Empty before its first step.
  std::map<std::string, at::Tensor> state_of(const at::Tensor& param) const {
    std::map<std::string, at::Tensor> found;
    const auto* state = find_state(param);
    if (!state) return found;
    const auto add = [&](const std::string& key, const at::Tensor& t) {
      if (t.defined()) found.emplace(key, t);
    };
    add("step", state->step);
    add("master", state->master);
    const auto& specs = own_defaults().states();
    for (size_t s = 0; s < specs.size(); ++s) {
      add(specs[s].name, state->states[s]);
      add(std::string(specs[s].name) + "_scale", state->scales[s]);
    }
    for (const auto& [name, value] : state->others)
      if (value.isTensor()) add(name, value.toTensor());
    return found;
  }

  // Python's state_dict(): a dict of "state" and "param_groups" that fusedamp.optim, torch.optim and
  // load_state_dict() take. Shares memory with the states.
  c10::IValue state_dict() const;
  // Loads a state dict of this class, made by C++ or Python, or of its torch.optim counterpart; copies. Storage formats
  // stay as they are; a missing master is made from the weights at the next step. Throws before anything is loaded.
  void load_state_dict(const c10::IValue& state_dict);

  void save(torch::serialize::OutputArchive& archive) const override { archive.write("state_dict", state_dict()); }
  void load(torch::serialize::InputArchive& archive) override {
    load_state_dict(detail::read_state_dict(archive, name_));
  }

  const std::string& name() const { return name_; }

  // For fusedamp::GradScaler. False for a subclass, whose step may read gradients before it calls this one.
  virtual bool has_own_step() const = 0;
  // One step with what the scaler found on each device; no inputs: an unscaled step. Whether the op has counted it in
  // the log of the inputs.
  bool step_with(const detail::DeviceInputs& inputs);
  // Lives as long as this optimizer, and moves with it.
  std::shared_ptr<void> token() const { return token_; }

 protected:
  FusedOptimizer(std::string name, const std::vector<torch::optim::OptimizerParamGroup>& groups,
                 std::unique_ptr<Options> defaults)
      : torch::optim::Optimizer(std::vector<torch::optim::OptimizerParamGroup>(), std::move(defaults)),
        name_(std::move(name)) {
    fusedamp::check_version();
    own_defaults().check("[" + name_ + "]");
    for (const auto& group : groups) add_param_group(group);
  }

  // Makes the states of all parameters that can have one now, as torch's Adagrad does.
  void create_states();

 private:
  std::string where(size_t group) const { return detail::text("[", name_, "] group ", group, ":"); }
  std::string where(const detail::Slot& slot) const {
    return detail::text(where(slot.group), " params[", slot.index, "]");
  }

  // Refuses an optimizer without any, which has no groups either: its step would do nothing.
  Options& own_defaults() const {
    if (!defaults_)
      detail::refuse(
          "[FusedOptimizer] was moved to another one; expected an optimizer with its groups. Use the one that has "
          "them.");
    return static_cast<Options&>(*defaults_);
  }

  Options& need_own_class(torch::optim::OptimizerOptions& options, size_t group) const {
    const Options& own = own_defaults();
    if (typeid(options) != typeid(own))
      detail::refuse_type(detail::text(where(group), " has options of ", c10::demangle(typeid(options).name()),
                                       "; expected ", c10::demangle(typeid(own).name()),
                                       ", as the optimizer's. Pass such options."));
    return static_cast<Options&>(options);
  }
  Options& options(size_t group) const {
    return need_own_class(const_cast<torch::optim::OptimizerOptions&>(param_groups_[group].options()), group);
  }

  void seed(Options& group) {
    if (group.storage().seed || !group.storage().draws()) return;
    if (!own_seed_) own_seed_ = detail::next_seed();
    group.set_seed(own_seed_);
  }

  detail::ParamState* find_state(const at::Tensor& param) const {
    const auto found = state_.find(param.unsafeGetTensorImpl());
    return found == state_.end() ? nullptr : dynamic_cast<detail::ParamState*>(found->second.get());
  }

  std::vector<detail::GroupMode> check_options();
  std::vector<detail::Slot> slots_of(const std::vector<detail::GroupMode>& modes, bool only_with_gradient) const;
  void complete(std::vector<detail::Slot>& slots);
  std::vector<detail::Batch> batches_of(const std::vector<detail::Slot>& slots) const;
  void prepare(std::vector<detail::Slot>& slots, const std::vector<detail::GroupMode>& modes,
               const detail::DeviceInputs& inputs);
  void launch(const std::vector<detail::GroupMode>& modes, const detail::DeviceInputs& inputs);
  detail::StepInputs inputs_on(const detail::DeviceInputs& inputs, c10::Device device) const;
  void drop_orphans();

  std::string name_;
  std::optional<int64_t> own_seed_;
  detail::Plan plan_;
  std::shared_ptr<void> token_ = std::make_shared<char>();
};

}  // namespace fusedamp::optim

#include "optimizer_step.h"
