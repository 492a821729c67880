// Checks of options.
#include "../families.h"

#include <c10/util/Type.h>

#include <cstring>

#include "bounds.h"
#include "fields.h"

namespace fusedamp::optim {
namespace detail {

std::string storage_name(c10::ScalarType dtype) { return name_of(dtype); }
std::string storage_name(std::string name) {
  if (name.rfind("torch.", 0) == 0) name.erase(0, 6);
  if (name == "fp32" || name == "float") return "float32";
  return name == "bf16" ? "bfloat16" : name;
}

void refuse_class(const char* name, const std::type_info& got, const std::type_info& wanted) {
  refuse_type(text("[", name, "] options are of the class ", c10::demangle(got.name()), "; expected ",
                   c10::demangle(wanted.name()), " itself, as only its fields are copied. Pass such options."));
}

}  // namespace detail

double Options::get_lr() const { return lr_tensor_.defined() ? lr_tensor_.item<double>() : lr_; }
void Options::set_lr(const double lr) {
  if (lr_tensor_.defined())
    lr_tensor_.detach().fill_(lr);
  else
    lr_ = lr;
}

void Options::check(const std::string& where) {
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

void SGDOptions::check_together(const std::string& where) const {
  if (nesterov_ && (momentum_ <= 0.0 || dampening_ != 0.0))
    detail::refuse_value(detail::text(where, " nesterov is True with momentum ", detail::repr(momentum_),
                                      " and dampening ", detail::repr(dampening_),
                                      "; expected momentum > 0 and dampening 0. Pass these, or nesterov=False."));
}

void RMSpropOptions::check_together(const std::string& where) const {
  if (centered_ && state_dtype_ != "float32")
    detail::refuse_value(where + " state_dtype is " + detail::repr(state_dtype_) +
                         " with centered=True; expected \"float32\", as the difference of two rounded states may "
                         "lose the variance. Pass centered=False.");
}

void LAMBOptions::check_together(const std::string& where) const {
  if (!std::isinf(trust_clip_) || trust_clip_ < 0.0) detail::check_bounds(where, {"trust_clip"}, trust_clip_);
}

}  // namespace fusedamp::optim
