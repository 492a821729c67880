// Groups of state dicts: the fields of options as plain values.
#pragma once
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "bounds.h"
#include "fields.h"

namespace fusedamp::optim::detail {

// Writes fields into a dict.
struct Writing {
  Dict& group;
  template <class Value>
  void operator()(const char* name, Value& value) const {
    group.insert(name, value);
  }
  void operator()(const char* name, Betas& value) const {
    group.insert(name, c10::ivalue::Tuple::create({value.first, value.second}));
  }
  void operator()(const char* name, std::optional<int64_t>& value) const {
    group.insert(name, value ? c10::IValue(*value) : c10::IValue());
  }
};

// Reads fields from a dict; those that it lacks, and storage formats, stay.
struct Reading {
  const std::string& where;
  const Dict& group;

  double number(const std::string& name, const c10::IValue& value) const {
    return value.isBool() ? value.toBool() : fusedamp::detail::number(where, name, value);
  }
  void operator()(const char* name, double& value) const {
    if (const auto found = find(group, name)) value = number(name, *found);
  }
  void operator()(const char* name, bool& value) const {
    const auto found = find(group, name);
    if (!found || std::strcmp(name, "stochastic_rounding") == 0) return;
    if (!found->isBool() && !found->isInt())
      refuse_type(text(where, " ", name, " is ", repr(*found), "; expected True or False. Load an intact checkpoint."));
    value = found->isBool() ? found->toBool() : found->toInt() != 0;
  }
  void operator()(const char* name, Betas& value) const {
    const auto found = find(group, name);
    if (!found) return;
    const auto items = items_of(*found);
    if (!items) refuse_type(text(where, " ", name, " is ", shown(*found), "; expected 2 numbers. Pass a tuple."));
    if (items->size() != 2) refuse(where, name, *found, "2 numbers");
    value = {number(text(name, "[0]"), (*items)[0]), number(text(name, "[1]"), (*items)[1])};
  }
  void operator()(const char*, std::string&) const {}  // master_weights, state_dtype
  void operator()(const char* name, std::optional<int64_t>& value) const {
    const auto found = find(group, name);
    if (!found || found->isNone()) return;
    if (!found->isInt()) refuse_seed(where, repr(*found));
    value = found->toInt();
  }
};

// Whether an option of a checkpoint that these options lack would change the steps. Python's optim/state/foreign.py has
// the same lists.
inline bool is_rule(const std::string& name, const c10::IValue& value) {
  static const std::unordered_set<std::string> none = {
      "params",  "param_names", "name",         "initial_lr",     "max_lr",        "min_lr", "base_lr",
      "swa_lr",  "lr_scale",    "max_momentum", "min_momentum",   "base_momentum", "step",   "use_orig_params",
      "foreach", "fused",       "capturable",   "differentiable", "maximize"};
  static const std::unordered_map<std::string, std::vector<double>> neutral = {
      {"bias_correction", {1}},   {"correct_bias", {1}}, {"decouple_lr", {0}}, {"amsgrad", {0}},
      {"nesterov", {0}},          {"momentum", {0}},     {"dampening", {0}},   {"max_grad_norm", {0, HUGE_VAL}},
      {"max_norm", {0, HUGE_VAL}}};
  if (none.count(name) || !is_number(value)) return false;
  const auto found = neutral.find(name);
  if (found == neutral.end()) return true;
  return std::find(found->second.begin(), found->second.end(), number_of(value)) == found->second.end();
}

// Reads a saved group. A learning rate goes into `lr`; load_state_dict() writes it into `lr_tensor` if there is one.
inline std::string read_options(Options& options, const std::string& where, const std::string& optimizer,
                                const Dict& group) {
  std::unordered_set<std::string> own = {"params"};
  for_each_field(options, [&](const char* name, auto&) { own.insert(name); });
  options.others.clear();
  std::string ignored;
  for (const auto& item : group) {
    const std::string& name = item.key().toStringRef();
    if (own.count(name)) continue;
    options.others.emplace_back(name, item.value());
    if (is_rule(name, item.value())) ignored += (ignored.empty() ? "" : ", ") + name + "=" + repr(item.value());
  }
  for_each_field(options, Reading{where, group});
  options.settle();
  options.check(where);
  if (ignored.empty()) return "";
  return text(
      where, " the checkpoint has ", ignored, ", which ", optimizer,
      " does not have: kept in the group and ignored by its steps. Set this optimizer's own options to the same "
      "effect.");
}

}  // namespace fusedamp::optim::detail
