// Groups and states of fused optimizers.
#include "../optimizer.h"

#include <c10/util/Type.h>

#include <atomic>
#include <typeinfo>
#include <unordered_set>

#include "plan.h"

namespace fusedamp::optim {
namespace detail {

// Seeds of optimizers that draw random numbers and were given none. torch's generators are not used: results then
// depend on nothing but the order of construction. Inline: one count in a process of several libraries.
inline int64_t next_seed() {
  static std::atomic<int64_t> seeds{0};
  return seeds++ % (int64_t{1} << 31);
}

}  // namespace detail

FusedOptimizer::FusedOptimizer(std::string name, const std::vector<torch::optim::OptimizerParamGroup>& groups,
                               const Options& defaults)
    : torch::optim::Optimizer(std::vector<torch::optim::OptimizerParamGroup>(), defaults.clone()),
      name_(std::move(name)),
      plan_(std::make_unique<detail::Plan>()),
      token_(std::make_shared<char>()) {
  fusedamp::check_version();
  own_defaults().check("[" + name_ + "]");
  for (const auto& group : groups) add_param_group(group);
}

FusedOptimizer::FusedOptimizer(FusedOptimizer&&) noexcept = default;
FusedOptimizer& FusedOptimizer::operator=(FusedOptimizer&&) noexcept = default;
FusedOptimizer::~FusedOptimizer() = default;

at::Tensor FusedOptimizer::step(LossClosure closure) {
  at::Tensor loss;
  if (closure) {
    at::AutoGradMode on(true);
    loss = closure();
  }
  step_with({});
  return loss;
}

void FusedOptimizer::add_param_group(const torch::optim::OptimizerParamGroup& group) {
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

std::map<std::string, at::Tensor> FusedOptimizer::state_of(const at::Tensor& param) const {
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

std::string FusedOptimizer::where(size_t group) const { return detail::text("[", name_, "] group ", group, ":"); }
std::string FusedOptimizer::where(const detail::Slot& slot) const {
  return detail::text(where(slot.group), " params[", slot.index, "]");
}

// Refuses an optimizer without any, which has no groups either: its step would do nothing.
Options& FusedOptimizer::own_defaults() const {
  if (!defaults_)
    detail::refuse(
        "[FusedOptimizer] was moved to another one; expected an optimizer with its groups. Use the one that has "
        "them.");
  return static_cast<Options&>(*defaults_);
}

Options& FusedOptimizer::need_own_class(torch::optim::OptimizerOptions& options, size_t group) const {
  const Options& own = own_defaults();
  if (typeid(options) != typeid(own))
    detail::refuse_type(detail::text(where(group), " has options of ", c10::demangle(typeid(options).name()),
                                     "; expected ", c10::demangle(typeid(own).name()),
                                     ", as the optimizer's. Pass such options."));
  return static_cast<Options&>(options);
}
Options& FusedOptimizer::options(size_t group) const {
  return need_own_class(const_cast<torch::optim::OptimizerOptions&>(param_groups_[group].options()), group);
}

void FusedOptimizer::seed(Options& group) {
  if (group.storage().seed || !group.storage().draws()) return;
  if (!own_seed_) own_seed_ = detail::next_seed();
  group.set_seed(own_seed_);
}

detail::ParamState* FusedOptimizer::find_state(const at::Tensor& param) const {
  const auto found = state_.find(param.unsafeGetTensorImpl());
  return found == state_.end() ? nullptr : dynamic_cast<detail::ParamState*>(found->second.get());
}

}  // namespace fusedamp::optim
