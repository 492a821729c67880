// The base class of all fused optimizers: groups, states, checkpoints, and the step over groups and devices.
#pragma once
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "families.h"

namespace fusedamp::detail {

struct StepInputs;

}  // namespace fusedamp::detail

namespace fusedamp::optim {
namespace detail {

struct Batch;
struct GroupMode;
struct ParamState;
class Plan;
struct Slot;

// What a scaler hands to a step, for each device that has gradients.
using DeviceInputs = std::vector<std::pair<c10::Device, StepInputs>>;

}  // namespace detail

// A torch::optim::Optimizer whose step is one op call per device. State is made at the first step. Nothing is written
// if anything is wrong with an option, a parameter or a gradient. No step waits for a device.
class FusedOptimizer : public torch::optim::Optimizer {
 public:
  FusedOptimizer(FusedOptimizer&&) noexcept;
  FusedOptimizer& operator=(FusedOptimizer&&) noexcept;
  ~FusedOptimizer() override;

  // Updates all parameters that have a gradient; returns the loss that the closure returned. Throws c10::ValueError
  // naming group and parameter, before anything is updated.
  at::Tensor step(LossClosure closure = nullptr) override;

  // Adds a group with its own options, which must be of this optimizer's class, or with the defaults. Not virtual in
  // torch: through a reference to torch::optim::Optimizer, torch's method is called, which loses the group's options.
  void add_param_group(const torch::optim::OptimizerParamGroup& group);

  // The state of a parameter under Python's names: "step", "exp_avg", "exp_avg_scale", "master" ... The tensors are the
  // optimizer's own and may be written. Empty before its first step.
  std::map<std::string, at::Tensor> state_of(const at::Tensor& param) const;

  // Python's state_dict(): a dict of "state" and "param_groups" that fusedamp.optim, torch.optim and
  // load_state_dict() take. Shares memory with the states.
  c10::IValue state_dict() const;
  // Loads a state dict of this class, made by C++ or Python, or of its torch.optim counterpart; copies. Storage formats
  // stay as they are; a missing master is made from the weights at the next step. Throws before anything is loaded.
  void load_state_dict(const c10::IValue& state_dict);

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

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
                 const Options& defaults);

  // Makes the states of all parameters that can have one now, as torch's Adagrad does.
  void create_states();

 private:
  std::string where(size_t group) const;
  std::string where(const detail::Slot& slot) const;
  Options& own_defaults() const;
  Options& need_own_class(torch::optim::OptimizerOptions& options, size_t group) const;
  Options& options(size_t group) const;
  void seed(Options& group);
  detail::ParamState* find_state(const at::Tensor& param) const;

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
  std::unique_ptr<detail::Plan> plan_;
  std::shared_ptr<void> token_;
};

}  // namespace fusedamp::optim
