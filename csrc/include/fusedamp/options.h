// Options of a parameter group: fields by name, as Python has them, and their checks.
#pragma once
#include <ATen/core/ivalue.h>
#include <torch/optim/optimizer.h>

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <typeinfo>
#include <utility>
#include <vector>

namespace fusedamp::detail {}

namespace fusedamp::optim {

using Betas = std::pair<double, double>;

namespace detail {

using namespace fusedamp::detail;

// Sees each field of options under its Python name.
struct Visitor {
  virtual ~Visitor() = default;
  virtual void operator()(const char* name, double& value) = 0;
  virtual void operator()(const char* name, bool& value) = 0;
  virtual void operator()(const char* name, Betas& value) = 0;
  virtual void operator()(const char* name, std::string& value) = 0;
  virtual void operator()(const char* name, std::optional<int64_t>& value) = 0;
};

// What an option may be: numbers >= low and < below.
struct Bounds {
  const char* name;
  double low = 0.0, below = std::numeric_limits<double>::infinity();
};

// How masters, states and weights without masters are kept.
struct Storage {
  std::string masters, states;  // the options master_weights and state_dtype
  bool stochastic;
  std::optional<int64_t> seed;

  bool draws() const { return states != "float32" || stochastic; }
  bool operator==(const Storage& other) const {
    return masters == other.masters && states == other.states && stochastic == other.stochastic && seed == other.seed;
  }
};

// One state of an optimizer, besides "step" and "master".
struct StateSpec {
  const char* name;
  bool nonnegative = false;  // its 8-bit format needs no sign
  bool required = false;     // a checkpoint must have it for every parameter with state
  double first = 0.0;        // initial value
  bool scalar = false;       // one FP64 element per parameter
  double count = -1.0;       // the step count if a checkpoint has this state without one; -1: a count is required
  bool restarts = false;     // creating it resets the step count
};

std::string storage_name(c10::ScalarType dtype);
std::string storage_name(std::string name);

// Refuses to copy options of a class of which only the base class's fields would be copied.
[[noreturn]] void refuse_class(const char* name, const std::type_info& got, const std::type_info& wanted);

}  // namespace detail

// Base class of all options. A learning rate may be a tensor, `lr_tensor`: one FP32 or FP64 element, which is read on
// the device at each step, so schedulers that write it need no host sync.
class Options : public torch::optim::OptimizerOptions {
 public:
  // Calls `visit` with each field, in the order of Python's groups.
  virtual void each_field(detail::Visitor& visit) = 0;
  virtual std::string op() const = 0;  // the step op: "adamw_"
  virtual const std::vector<detail::StateSpec>& states() const = 0;
  virtual bool uses(size_t /*state*/) const { return true; }
  virtual double first(size_t state) const { return states()[state].first; }
  virtual const std::vector<detail::Bounds>& bounds() const = 0;
  // Throws if a field is invalid. `where` starts the message.
  void check(const std::string& where);
  virtual bool takes_sparse() const { return false; }
  // After a checkpoint was read, which may be that of a related optimizer.
  virtual void settle() {}

  detail::Storage storage() const { return {master_weights_, state_dtype_, stochastic_rounding_, rounding_seed_}; }
  // Options that all optimizers have, for code that knows no more of one.
  const at::Tensor& rate_tensor() const { return lr_tensor_; }
  bool maximizes() const { return maximize_; }
  double rate() const { return lr_; }
  void set_seed(std::optional<int64_t> seed) { rounding_seed_ = seed; }

  double get_lr() const override;
  void set_lr(const double lr) override;

  // The rest of a group that a checkpoint brought, such as "initial_lr": kept, and saved again.
  std::vector<std::pair<std::string, c10::IValue>> others;

 protected:
  // Throws if fields contradict each other.
  virtual void check_together(const std::string& /*where*/) const {}

  double lr_ = 1e-3, weight_decay_ = 0.0;
  bool maximize_ = false, stochastic_rounding_ = false;
  at::Tensor lr_tensor_;
  std::string master_weights_ = "auto", state_dtype_ = "float32";
  std::optional<int64_t> rounding_seed_;
};

// A field of options, with torch's accessors. The first returns the options' own class, for which a chain goes on.
#define FUSEDAMP_FIELD(Type, name, ...)                       \
 protected:                                                   \
  Type name##_ = __VA_ARGS__;                                 \
                                                              \
 public:                                                      \
  auto name(Type value) -> decltype(this->own()) {            \
    this->name##_ = std::move(value);                         \
    return this->own();                                       \
  }                                                           \
  const Type& name() const noexcept { return this->name##_; } \
  Type& name() noexcept { return this->name##_; }

// Betas, also as torch's options take them.
#define FUSEDAMP_BETAS(...)                                                     \
  FUSEDAMP_FIELD(Betas, betas, __VA_ARGS__)                                     \
  template <class First, class Second>                                          \
  auto betas(const std::tuple<First, Second>& value) -> decltype(this->own()) { \
    return betas(Betas(std::get<0>(value), std::get<1>(value)));                \
  }

// The options of all optimizers. Betas, bounds and storage formats: docs/optimizers.md and docs/formats.md.
template <class Derived>
class OptionsOf : public Options {
 public:
  std::unique_ptr<torch::optim::OptimizerOptions> clone() const override {
    const auto& own = static_cast<const Derived&>(*this);
    if (typeid(own) != typeid(Derived)) detail::refuse_class(Derived::kName, typeid(own), typeid(Derived));
    return std::make_unique<Derived>(own);
  }
  Derived& lr(double value) { return set(lr_, value); }
  Derived& weight_decay(double value) { return set(weight_decay_, value); }
  Derived& maximize(bool value) { return set(maximize_, value); }
  // One FP32 or FP64 element on the parameters' device, instead of `lr`.
  Derived& lr_tensor(at::Tensor value) { return set(lr_tensor_, std::move(value)); }
  // "auto", "fp32", "split" or "none".
  Derived& master_weights(std::string value) {
    return set(master_weights_, value == "float32" || value == "torch.float32" ? "fp32" : std::move(value));
  }
  // torch::kFloat, torch::kBFloat16, torch::kInt8, or Python's texts.
  Derived& state_dtype(c10::ScalarType value) { return set(state_dtype_, detail::storage_name(value)); }
  Derived& state_dtype(std::string value) { return set(state_dtype_, detail::storage_name(std::move(value))); }
  Derived& state_dtype(const char* value) { return state_dtype(std::string(value)); }
  Derived& stochastic_rounding(bool value) { return set(stochastic_rounding_, value); }
  // 0 to 2^31 - 1; std::nullopt: a number of this optimizer's own.
  Derived& rounding_seed(std::optional<int64_t> value) { return set(rounding_seed_, value); }

  const double& lr() const noexcept { return lr_; }
  double& lr() noexcept { return lr_; }
  const double& weight_decay() const noexcept { return weight_decay_; }
  double& weight_decay() noexcept { return weight_decay_; }
  bool maximize() const noexcept { return maximize_; }
  const at::Tensor& lr_tensor() const noexcept { return lr_tensor_; }
  const std::string& master_weights() const noexcept { return master_weights_; }
  const std::string& state_dtype() const noexcept { return state_dtype_; }
  bool stochastic_rounding() const noexcept { return stochastic_rounding_; }
  const std::optional<int64_t>& rounding_seed() const noexcept { return rounding_seed_; }

  void each_field(detail::Visitor& visit) override {
    visit("lr", lr_);
    static_cast<Derived*>(this)->fields(visit);
    visit("weight_decay", weight_decay_);
    visit("maximize", maximize_);
    visit("master_weights", master_weights_);
    visit("state_dtype", state_dtype_);
    visit("stochastic_rounding", stochastic_rounding_);
    visit("rounding_seed", rounding_seed_);
  }

 protected:
  explicit OptionsOf(double lr, double weight_decay = 0.0) {
    lr_ = lr;
    weight_decay_ = weight_decay;
  }
  Derived& own() { return static_cast<Derived&>(*this); }

 private:
  template <class T, class Value>
  Derived& set(T& field, Value&& value) {
    field = std::forward<Value>(value);
    return own();
  }
};

}  // namespace fusedamp::optim
