// The optimizers: torch::optim's and others, with FP32 masters of 16-bit weights and one op call per device.
//
//   fusedamp::optim::AdamW optimizer(model->parameters(), fusedamp::optim::AdamWOptions(3e-5).weight_decay(0.1));
#pragma once
#include <type_traits>

#include "optimizer.h"

namespace fusedamp::optim {

// An optimizer with options of class `OptionsType`, which the aliases below name.
template <class OptionsType>
class Optimizer : public FusedOptimizer {
 public:
  // Each group has its own options, whole, or the defaults.
  explicit Optimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups, const OptionsType& defaults = {})
      : FusedOptimizer(OptionsType::kName, groups, defaults) {
    if (std::is_same_v<OptionsType, AdagradOptions>) create_states();
  }
  explicit Optimizer(std::vector<at::Tensor> params, const OptionsType& defaults = {})
      : Optimizer({torch::optim::OptimizerParamGroup(std::move(params))}, defaults) {}

  bool has_own_step() const override { return typeid(*this) == typeid(Optimizer); }
};

using Adam = Optimizer<AdamOptions>;
using AdamW = Optimizer<AdamWOptions>;
using SGD = Optimizer<SGDOptions>;
using Lion = Optimizer<LionOptions>;
using Adagrad = Optimizer<AdagradOptions>;
using RMSprop = Optimizer<RMSpropOptions>;
using RAdam = Optimizer<RAdamOptions>;
using NAdam = Optimizer<NAdamOptions>;
using LAMB = Optimizer<LAMBOptions>;
using LARS = Optimizer<LARSOptions>;
using NovoGrad = Optimizer<NovoGradOptions>;

// In Python only: their steps are made of several ops.
#define FUSEDAMP_PYTHON_ONLY(Name)                                                                                \
  struct Name {                                                                                                   \
    template <class First, class... Rest>                                                                         \
    explicit Name(const First&, const Rest&...) {                                                                 \
      static_assert(sizeof(First) == 0, "fusedamp has " #Name " in Python only; use AdamW, Lion or LAMB in C++"); \
    }                                                                                                             \
  };
FUSEDAMP_PYTHON_ONLY(Adafactor)
FUSEDAMP_PYTHON_ONLY(Muon)
#undef FUSEDAMP_PYTHON_ONLY

}  // namespace fusedamp::optim
