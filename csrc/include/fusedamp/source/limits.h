// Checks of GradScaler's options and state dicts.
#pragma once
#include <charconv>

#include "../grad_scaler_options.h"
#include "headroom.h"

namespace fusedamp::detail {

constexpr const char* kScaler = "[GradScaler]";

// 3.4028235e+38
inline std::string float_max() {
  char digits[32];
  return {digits, std::to_chars(digits, digits + sizeof digits, kFloatMax, std::chars_format::general, 8).ptr};
}

template <class Value>
double checked_scale(const std::string& name, const Value& value) {
  const double scale = number(kScaler, name, value);
  if (!(0 < scale && scale <= kFloatMax))
    refuse(kScaler, name, value, "a finite number > 0 and at most " + float_max() + " as in FP32, such as 2.0**16");
  return scale;
}

template <class Value>
double checked_growth_factor(const Value& value) {
  const double factor = number(kScaler, "growth_factor", value);
  if (!(1 <= factor && std::isfinite(factor)))
    refuse(kScaler, "growth_factor", value, "a finite number >= 1, such as 2.0");
  return factor;
}

template <class Value>
double checked_backoff_factor(const Value& value) {
  const double factor = number(kScaler, "backoff_factor", value);
  if (!(0 < factor && factor <= 1)) refuse(kScaler, "backoff_factor", value, "a number > 0 and <= 1, such as 0.5");
  return factor;
}

template <class Value>
int64_t checked_interval(const Value& value) {
  return count(kScaler, "growth_interval", value, "the number of consecutive good steps that raise the scale");
}

// The policy "headroom" does not use the factors.
inline void need_unused_factors(double growth_factor, double backoff_factor) {
  const std::string why = " with policy=\"headroom\", which moves the scale by whole bits";
  if (growth_factor != 2.0) refuse(kScaler, "growth_factor", growth_factor, "2.0" + why);
  if (backoff_factor != 0.5) refuse(kScaler, "backoff_factor", backoff_factor, "0.5" + why);
}

inline void check_limits(const GradScalerOptions& o) {
  const double low = o.min_scale(), high = o.max_scale();
  if (!(kMinScale <= low && low <= kFloatMax))
    refuse(kScaler, "min_scale", low,
           "a finite number >= 2**-126 (the default), which keeps 1/scale finite, and <= " + float_max());
  if (!((low <= high && high <= kFloatMax) || high == INFINITY))
    refuse(kScaler, "max_scale", high,
           text("a number >= min_scale (", repr(low), ") and <= ", float_max(), ", or inf for no ceiling"));
  count(kScaler, "hysteresis", o.hysteresis(), "overflows until the scale is lowered; 1 as in torch");
  if (o.hysteresis_refill() != "growth" && o.hysteresis_refill() != "good_step")
    refuse(kScaler, "hysteresis_refill", o.hysteresis_refill(), "\"growth\" or \"good_step\"");
  if (o.on_floor() != "warn" && o.on_floor() != "raise")
    refuse(kScaler, "on_floor", o.on_floor(), "\"warn\" or \"raise\"");
}

// Whether the policy is "headroom".
inline bool check_policy(const GradScalerOptions& o) {
  count(kScaler, "headroom_bits", o.headroom_bits(), "bits between the largest gradients and 2**16", 0, 14);
  if (o.policy() == "overflow") {
    if (o.headroom_bits() != 2) refuse(kScaler, "headroom_bits", o.headroom_bits(), "policy=\"headroom\" with it");
    return false;
  }
  if (o.policy() != "headroom") refuse(kScaler, "policy", o.policy(), "\"overflow\" or \"headroom\"");
  const std::string own = "the default with policy=\"headroom\", which has its own reaction to overflows";
  if (o.hysteresis() != 1) refuse(kScaler, "hysteresis", o.hysteresis(), own);
  if (o.hysteresis_refill() != "growth") refuse(kScaler, "hysteresis_refill", o.hysteresis_refill(), own);
  if (std::exp2(std::ceil(std::log2(o.min_scale()))) > std::min(o.max_scale(), std::exp2(127)))
    refuse(kScaler, "max_scale", o.max_scale(),
           text("a power of two from min_scale (", repr(o.min_scale()), ") to it, with policy=\"headroom\""));
  return true;
}

// Throws unless the options can be used; torch's scaler does not check those of a disabled one either.
inline void check_options(const GradScalerOptions& o) {
  check_limits(o);
  const bool headroom = check_policy(o);
  if (!o.enabled()) return;
  if (o.growth_factor() <= 1.0) refuse("The growth factor must be > 1.0.");
  if (o.backoff_factor() >= 1.0) refuse("The backoff factor must be < 1.0.");
  checked_growth_factor(o.growth_factor());
  checked_backoff_factor(o.backoff_factor());
  checked_interval(o.growth_interval());
  const double scale = checked_scale("init_scale", o.init_scale());
  if (!(o.min_scale() <= scale && scale <= o.max_scale()))
    refuse(kScaler, "init_scale", scale,
           text("a number from min_scale (", repr(o.min_scale()), ") to max_scale (", repr(o.max_scale()), ")"));
  if (headroom) need_unused_factors(o.growth_factor(), o.backoff_factor());
}

// A scaler's state dict in numbers within the limits of their dtypes.
struct ScalerState {
  double scale, growth_factor, backoff_factor;
  int64_t growth_interval, growth_tracker;
  std::optional<int64_t> hysteresis_tracker;
  std::vector<int64_t> headroom;
};

// Reads what state_dict() returns, or torch's scaler in Python. The entry "_headroom" is read only if `headroom`.
inline ScalerState checked_state(const c10::IValue& state_dict, bool headroom) {
  if (!state_dict.isGenericDict())
    refuse_type(
        text(kScaler, " state_dict is a ", kind_of(state_dict), "; expected a dict. Pass what state_dict() returned."));
  const Dict dict = state_dict.toGenericDict();
  if (dict.empty())
    refuse("The source state dict is empty, possibly because it was saved from a disabled instance of GradScaler.");
  const auto need = [&](const char* name) {
    const auto found = find(dict, name);
    if (!found)
      refuse_value(text(kScaler, " state_dict has no ", repr(std::string(name)),
                        "; expected all entries that state_dict() returns. Load a whole state."));
    return *found;
  };
  const auto tracker = [](const std::string& name, const c10::IValue& value, const char* what) {
    return count(kScaler, "state_dict['" + name + "']", value, what, 0, kInt32Max - 1);  // the next good step counts 1
  };
  ScalerState state;
  const c10::IValue scale = need("scale");
  state.scale = number(kScaler, "state_dict['scale']", scale);
  if (state.scale != 0) checked_scale("state_dict['scale']", scale);  // torch's scaler can reach 0
  state.growth_factor = checked_growth_factor(need("growth_factor"));
  state.backoff_factor = checked_backoff_factor(need("backoff_factor"));
  state.growth_interval = checked_interval(need("growth_interval"));
  state.growth_tracker = tracker("_growth_tracker", need("_growth_tracker"), "good steps in a row");
  if (const auto left = find(dict, "_hysteresis_tracker"); left && !left->isNone())
    state.hysteresis_tracker = tracker("_hysteresis_tracker", *left, "overflows left to forgive");
  if (const auto saved = find(dict, "_headroom"); headroom && saved) state.headroom = Headroom::checked(*saved);
  return state;
}

}  // namespace fusedamp::detail
