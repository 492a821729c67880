// Options of a parameter group: fields by name, as Python has them, and their checks.
#pragma once
#include <c10/util/Type.h>
#include <torch/optim/optimizer.h>

#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <typeinfo>
#include <utility>
#include <vector>

#include "numbers.h"

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

constexpr double kLargest = 3.4028234663852886e38;  // steps compute with FP32: beyond it, 0 * lr would be NaN

inline void check_bounds(const std::string& where, const Bounds& bounds, double value, const std::string& item = "") {
  if (value >= bounds.low && value < bounds.below && std::abs(value) <= kLargest) return;
  const std::string wanted = std::isinf(bounds.below) ? text("a finite number", std::isinf(bounds.low) ? "" : " >= 0",
                                                             ", at most 3.4e38 as in FP32")
                                                      : text("a number >= ", bounds.low, " and < ", bounds.below);
  refuse_value(text(where, " ", bounds.name, item, " is ", repr(value), "; expected ", wanted, ". Pass such a value."));
}

[[noreturn]] inline void refuse_seed(const std::string& where, const std::string& got) {
  refuse_value(where + " rounding_seed is " + got +
               "; expected a whole number from 0 to 2**31 - 1, or None for one that is unique in this process. Pass "
               "one.");
}

inline std::string storage_name(c10::ScalarType dtype) { return name_of(dtype); }
inline std::string storage_name(std::string name) {
  if (name.rfind("torch.", 0) == 0) name.erase(0, 6);
  if (name == "fp32" || name == "float") return "float32";
  return name == "bf16" ? "bfloat16" : name;
}

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

  double get_lr() const override { return lr_tensor_.defined() ? lr_tensor_.item<double>() : lr_; }
  void set_lr(const double lr) override {
    if (lr_tensor_.defined())
      lr_tensor_.detach().fill_(lr);
    else
      lr_ = lr;
  }

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

namespace detail {

// Calls a function with each field.
template <class Function>
struct Each final : Visitor {
  explicit Each(Function f) : function(std::move(f)) {}
  void operator()(const char* name, double& value) override { function(name, value); }
  void operator()(const char* name, bool& value) override { function(name, value); }
  void operator()(const char* name, Betas& value) override { function(name, value); }
  void operator()(const char* name, std::string& value) override { function(name, value); }
  void operator()(const char* name, std::optional<int64_t>& value) override { function(name, value); }
  Function function;
};

template <class Function>
void for_each_field(Options& options, Function function) {
  Each<Function> each(std::move(function));
  options.each_field(each);
}

}  // namespace detail

inline void Options::check(const std::string& where) {
  using detail::repr, detail::refuse_value;
  if (!lr_tensor_.defined())
    detail::check_bounds(where, {"lr"}, lr_);
  else if (lr_tensor_.numel() != 1 || lr_tensor_.is_complex() || lr_tensor_.scalar_type() == c10::kBool)
    detail::refuse_kind(where, "lr", lr_tensor_);
  else if (lr_tensor_.is_cpu())
    detail::check_bounds(where, {"lr"}, lr_tensor_.item<double>());
  detail::check_bounds(where, {"weight_decay"}, weight_decay_);
  const auto& m = master_weights_;
  if (m != "auto" && m != "fp32" && m != "split" && m != "none")
    refuse_value(where + " master_weights is " + repr(m) +
                 "; expected one of ('auto', 'fp32', 'split', 'none'). Use \"auto\" for FP32 masters of FP16 and BF16 "
                 "parameters.");
  if (state_dtype_ != "float32" && state_dtype_ != "bfloat16" && state_dtype_ != "int8")
    refuse_value(where + " state_dtype is " + repr(state_dtype_) +
                 "; expected one of ('float32', 'bfloat16', 'int8'). Use \"float32\", which needs the most memory and "
                 "adds no error.");
  if (stochastic_rounding_ && m != "none")
    refuse_value(where + " stochastic_rounding is True with master_weights " + repr(m) +
                 "; expected \"none\", because a weight with a master is rounded to nearest. Pass "
                 "master_weights=\"none\".");
  if (rounding_seed_ && (*rounding_seed_ < 0 || *rounding_seed_ >= int64_t{1} << 31))
    detail::refuse_seed(where, repr(*rounding_seed_));
  struct Checking {
    const std::string& where;
    const std::vector<detail::Bounds>& limits;
    void operator()(const char* name, double& value) const {
      for (const auto& bounds : limits)
        if (std::strcmp(bounds.name, name) == 0) detail::check_bounds(where, bounds, value);
    }
    void operator()(const char* name, Betas& value) const {
      for (const auto& bounds : limits) {
        if (std::strcmp(bounds.name, name) != 0) continue;
        detail::check_bounds(where, bounds, value.first, "[0]");
        detail::check_bounds(where, bounds, value.second, "[1]");
      }
    }
    void operator()(const char*, bool&) const {}
    void operator()(const char*, std::string&) const {}
    void operator()(const char*, std::optional<int64_t>&) const {}
  };
  detail::for_each_field(*this, Checking{where, bounds()});
  check_together(where);
}

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
    if (typeid(own) != typeid(Derived))
      detail::refuse_type(detail::text(
          "[", Derived::kName, "] options are of the class ", c10::demangle(typeid(own).name()), "; expected ",
          c10::demangle(typeid(Derived).name()), " itself, as only its fields are copied. Pass such options."));
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
