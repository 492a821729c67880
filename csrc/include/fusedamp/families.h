// The options of each optimizer: fields and defaults as in Python, its op, its states. What the rules compute is in
// csrc/math; the names of an op's hyper-parameters are those of csrc/math/optimizers.def.
#pragma once
#include <limits>

#include "options.h"

namespace fusedamp::optim {
namespace detail {

constexpr double kFinite = -std::numeric_limits<double>::infinity();  // lower bound of any finite number

}  // namespace detail

#define FUSEDAMP_STATES(...)                                           \
  const std::vector<detail::StateSpec>& states() const override {      \
    static const std::vector<detail::StateSpec> specs = {__VA_ARGS__}; \
    return specs;                                                      \
  }
#define FUSEDAMP_BOUNDS(...)                                         \
  const std::vector<detail::Bounds>& bounds() const override {       \
    static const std::vector<detail::Bounds> limits = {__VA_ARGS__}; \
    return limits;                                                   \
  }

// Adam and AdamW differ in how weight decay enters: `decoupled_weight_decay`.
template <class Derived>
class AdamOptionsOf : public OptionsOf<Derived> {
 public:
  FUSEDAMP_BETAS({0.9, 0.999})
  FUSEDAMP_FIELD(double, eps, 1e-8)
  FUSEDAMP_FIELD(bool, amsgrad, false)
  FUSEDAMP_FIELD(bool, decoupled_weight_decay, false)

  void fields(detail::Visitor& visit) {
    visit("betas", betas_);
    visit("eps", eps_);
    visit("amsgrad", amsgrad_);
    visit("decoupled_weight_decay", decoupled_weight_decay_);
  }
  std::string op() const override { return decoupled_weight_decay_ ? "adamw_" : "adam_"; }
  FUSEDAMP_STATES({"exp_avg", false, true}, {"exp_avg_sq", true, true}, {"max_exp_avg_sq", true})
  bool uses(size_t state) const override { return state < 2 || amsgrad_; }
  FUSEDAMP_BOUNDS({"eps"}, {"betas", 0.0, 1.0})

 protected:
  using OptionsOf<Derived>::OptionsOf;
};

class AdamOptions : public AdamOptionsOf<AdamOptions> {
 public:
  static constexpr const char* kName = "Adam";
  AdamOptions(double lr = 1e-3) : AdamOptionsOf(lr) {}
};

class AdamWOptions : public AdamOptionsOf<AdamWOptions> {
 public:
  static constexpr const char* kName = "AdamW";
  AdamWOptions(double lr = 1e-3) : AdamOptionsOf(lr, 1e-2) { decoupled_weight_decay_ = true; }
  void settle() override { decoupled_weight_decay_ = true; }  // Adam's, and torch's before it had the option
};

class SGDOptions : public OptionsOf<SGDOptions> {
 public:
  static constexpr const char* kName = "SGD";
  SGDOptions(double lr = 1e-3) : OptionsOf(lr) {}
  FUSEDAMP_FIELD(double, momentum, 0.0)
  FUSEDAMP_FIELD(double, dampening, 0.0)
  FUSEDAMP_FIELD(bool, nesterov, false)

  void fields(detail::Visitor& visit) {
    visit("momentum", momentum_);
    visit("dampening", dampening_);
    visit("nesterov", nesterov_);
  }
  std::string op() const override { return "sgd_"; }
  // A buffer is initialized with its first gradient. torch stores no count: a loaded buffer counts as 1.
  FUSEDAMP_STATES({"momentum_buffer", false, false, 0.0, false, 1.0, true})
  bool uses(size_t) const override { return momentum_ != 0.0; }
  FUSEDAMP_BOUNDS({"momentum"}, {"dampening", detail::kFinite})
  void check_together(const std::string& where) const override;
  bool takes_sparse() const override { return true; }
};

class LionOptions : public OptionsOf<LionOptions> {
 public:
  static constexpr const char* kName = "Lion";
  LionOptions(double lr = 1e-4) : OptionsOf(lr) {}
  FUSEDAMP_BETAS({0.9, 0.99})

  void fields(detail::Visitor& visit) { visit("betas", betas_); }
  std::string op() const override { return "lion_"; }
  FUSEDAMP_STATES({"exp_avg", false, true, 0.0, false, 0.0})
  FUSEDAMP_BOUNDS({"betas", 0.0, 1.0})
};

class AdagradOptions : public OptionsOf<AdagradOptions> {
 public:
  static constexpr const char* kName = "Adagrad";
  AdagradOptions(double lr = 1e-2) : OptionsOf(lr) {}
  FUSEDAMP_FIELD(double, lr_decay, 0.0)
  FUSEDAMP_FIELD(double, eps, 1e-10)
  FUSEDAMP_FIELD(double, initial_accumulator_value, 0.0)  // the constructor's applies to every group, as in torch

  void fields(detail::Visitor& visit) {
    visit("lr_decay", lr_decay_);
    visit("eps", eps_);
    visit("initial_accumulator_value", initial_accumulator_value_);
  }
  std::string op() const override { return "adagrad_"; }
  FUSEDAMP_STATES({"sum", true, true})
  double first(size_t) const override { return initial_accumulator_value_; }
  FUSEDAMP_BOUNDS({"lr_decay"}, {"eps"}, {"initial_accumulator_value"})
  bool takes_sparse() const override { return true; }
};

class RMSpropOptions : public OptionsOf<RMSpropOptions> {
 public:
  static constexpr const char* kName = "RMSprop";
  RMSpropOptions(double lr = 1e-2) : OptionsOf(lr) {}
  FUSEDAMP_FIELD(double, momentum, 0.0)
  FUSEDAMP_FIELD(double, alpha, 0.99)
  FUSEDAMP_FIELD(double, eps, 1e-8)
  FUSEDAMP_FIELD(bool, centered, false)

  void fields(detail::Visitor& visit) {
    visit("momentum", momentum_);
    visit("alpha", alpha_);
    visit("eps", eps_);
    visit("centered", centered_);
  }
  std::string op() const override { return centered_ ? "rmsprop_centered_" : "rmsprop_"; }
  FUSEDAMP_STATES({"square_avg", true, true}, {"grad_avg"}, {"momentum_buffer"})
  bool uses(size_t state) const override { return state == 0 || (state == 1 ? centered_ : momentum_ != 0.0); }
  FUSEDAMP_BOUNDS({"alpha"}, {"eps"}, {"momentum"})
  void check_together(const std::string& where) const override;
};

class RAdamOptions : public OptionsOf<RAdamOptions> {
 public:
  static constexpr const char* kName = "RAdam";
  RAdamOptions(double lr = 1e-3) : OptionsOf(lr) {}
  FUSEDAMP_BETAS({0.9, 0.999})
  FUSEDAMP_FIELD(double, eps, 1e-8)
  FUSEDAMP_FIELD(bool, decoupled_weight_decay, false)

  void fields(detail::Visitor& visit) {
    visit("betas", betas_);
    visit("eps", eps_);
    visit("decoupled_weight_decay", decoupled_weight_decay_);
  }
  std::string op() const override { return "radam_"; }
  FUSEDAMP_STATES({"exp_avg", false, true}, {"exp_avg_sq", true, true})
  FUSEDAMP_BOUNDS({"eps"}, {"betas", 0.0, 1.0})
};

class NAdamOptions : public OptionsOf<NAdamOptions> {
 public:
  static constexpr const char* kName = "NAdam";
  NAdamOptions(double lr = 2e-3) : OptionsOf(lr) {}
  FUSEDAMP_BETAS({0.9, 0.999})
  FUSEDAMP_FIELD(double, eps, 1e-8)
  FUSEDAMP_FIELD(double, momentum_decay, 4e-3)
  FUSEDAMP_FIELD(bool, decoupled_weight_decay, false)

  void fields(detail::Visitor& visit) {
    visit("betas", betas_);
    visit("eps", eps_);
    visit("momentum_decay", momentum_decay_);
    visit("decoupled_weight_decay", decoupled_weight_decay_);
  }
  std::string op() const override { return "nadam_"; }
  FUSEDAMP_STATES({"exp_avg", false, true}, {"exp_avg_sq", true, true}, {"mu_product", false, true, 1.0, true})
  FUSEDAMP_BOUNDS({"eps"}, {"momentum_decay"}, {"betas", 0.0, 1.0})
};

class LAMBOptions : public OptionsOf<LAMBOptions> {
 public:
  static constexpr const char* kName = "LAMB";
  LAMBOptions(double lr = 1e-3) : OptionsOf(lr, 1e-2) {}
  FUSEDAMP_BETAS({0.9, 0.999})
  FUSEDAMP_FIELD(double, eps, 1e-6)
  FUSEDAMP_FIELD(bool, bias_correction, true)
  FUSEDAMP_FIELD(double, trust_clip, std::numeric_limits<double>::infinity())
  FUSEDAMP_FIELD(bool, adapt, true)

  void fields(detail::Visitor& visit) {
    visit("betas", betas_);
    visit("eps", eps_);
    visit("bias_correction", bias_correction_);
    visit("trust_clip", trust_clip_);
    visit("adapt", adapt_);
  }
  std::string op() const override { return "lamb_"; }
  FUSEDAMP_STATES({"exp_avg", false, true}, {"exp_avg_sq", true, true})
  FUSEDAMP_BOUNDS({"eps"}, {"betas", 0.0, 1.0})
  void check_together(const std::string& where) const override;
};

class LARSOptions : public OptionsOf<LARSOptions> {
 public:
  static constexpr const char* kName = "LARS";
  LARSOptions(double lr = 1e-1) : OptionsOf(lr) {}
  FUSEDAMP_FIELD(double, momentum, 0.9)
  FUSEDAMP_FIELD(double, trust_coefficient, 1e-3)
  FUSEDAMP_FIELD(double, eps, 1e-8)
  FUSEDAMP_FIELD(bool, nesterov, false)
  FUSEDAMP_FIELD(bool, adapt, true)

  void fields(detail::Visitor& visit) {
    visit("momentum", momentum_);
    visit("trust_coefficient", trust_coefficient_);
    visit("eps", eps_);
    visit("nesterov", nesterov_);
    visit("adapt", adapt_);
  }
  std::string op() const override { return "lars_"; }
  FUSEDAMP_STATES({"momentum_buffer", false, true, 0.0, false, 0.0})
  FUSEDAMP_BOUNDS({"momentum"}, {"trust_coefficient"}, {"eps"})
};

class NovoGradOptions : public OptionsOf<NovoGradOptions> {
 public:
  static constexpr const char* kName = "NovoGrad";
  NovoGradOptions(double lr = 1e-2) : OptionsOf(lr) {}
  FUSEDAMP_BETAS({0.95, 0.98})
  FUSEDAMP_FIELD(double, eps, 1e-8)
  FUSEDAMP_FIELD(bool, grad_averaging, false)

  void fields(detail::Visitor& visit) {
    visit("betas", betas_);
    visit("eps", eps_);
    visit("grad_averaging", grad_averaging_);
  }
  std::string op() const override { return "novograd_"; }
  FUSEDAMP_STATES({"exp_avg", false, true}, {"exp_avg_sq", false, true, 0.0, true})
  FUSEDAMP_BOUNDS({"eps"}, {"betas", 0.0, 1.0})
};

#undef FUSEDAMP_STATES
#undef FUSEDAMP_BOUNDS
#undef FUSEDAMP_BETAS

}  // namespace fusedamp::optim
