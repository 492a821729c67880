// The op of a group, with its numbers and states; and what holds while it runs.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <cstring>
#include <unordered_map>

#include "fields.h"
#include "slots.h"

namespace fusedamp::optim::detail {

// Within it tensors outlive inference mode, no graph is built, and ops reach their kernels at once.
struct StepMode {
  c10::InferenceMode off{false};
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView below;
};

// Names and rules of ops do not change in a process.
inline const std::vector<std::string>& known_hyper_names(const std::string& op) {
  thread_local std::unordered_map<std::string, std::vector<std::string>> known;
  auto found = known.find(op);
  if (found == known.end()) found = known.emplace(op, hyper_names(op)).first;
  return found->second;
}
inline int64_t known_rule(const std::string& op, int64_t states) {
  thread_local std::unordered_map<std::string, int64_t> known;
  const std::string key = op + std::to_string(states);
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, rule_of(op, states)).first;
  return found->second;
}

// The values of an op's hyper-parameters, in its order.
inline std::vector<double> hyper_of(Options& options, const std::string& op) {
  const auto& names = known_hyper_names(op);
  std::vector<double> values(names.size(), std::nan(""));
  const auto put = [&](const char* name, double value) {
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i] == name) values[i] = value;
  };
  for_each_field(options, [&](const char* name, auto& value) {
    using Value = std::decay_t<decltype(value)>;
    if constexpr (std::is_same_v<Value, double>) {
      const bool decays = std::strcmp(name, "momentum_decay") == 0;
      put(decays ? "decay_base" : name, decays ? std::pow(0.96, value) : value);
    } else if constexpr (std::is_same_v<Value, bool>) {
      put(std::strcmp(name, "decoupled_weight_decay") == 0 ? "decoupled" : name, value);
    } else if constexpr (std::is_same_v<Value, Betas>) {
      put("beta1", value.first);
      put("beta2", value.second);
    }
  });
  return values;
}

inline GroupMode mode_of(const Options& options) {
  GroupMode mode;
  mode.op = options.op();
  mode.storage = options.storage();
  mode.maximize = options.maximizes();
  const auto& specs = options.states();
  for (size_t s = 0; s < specs.size(); ++s)
    if (options.uses(s)) {
      mode.used.push_back(s);
      mode.tensors += !specs[s].scalar;
    }
  mode.rule = known_rule(mode.op, static_cast<int64_t>(mode.used.size()));
  return mode;
}

}  // namespace fusedamp::optim::detail
