// State dicts of optimizers: Python's structure, as plain values.
#include "../optimizer.h"

#include "archive.h"
#include "groups.h"
#include "mode.h"
#include "plan.h"
#include "saved.h"

namespace fusedamp::optim {

void FusedOptimizer::save(torch::serialize::OutputArchive& archive) const { archive.write("state_dict", state_dict()); }
void FusedOptimizer::load(torch::serialize::InputArchive& archive) {
  load_state_dict(detail::read_state_dict(archive, name_));
}

c10::IValue FusedOptimizer::state_dict() const {
  own_defaults();
  detail::List groups = detail::new_list();
  detail::Dict states = detail::new_dict(c10::IntType::get());
  int64_t index = 0;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    Options& now = options(g);
    detail::Dict group = detail::new_dict();
    for (const auto& [name, value] : now.others) group.insert(name, value);
    detail::for_each_field(now, detail::Writing{group});
    if (now.rate_tensor().defined()) group.insert_or_assign("lr", now.rate_tensor());
    detail::List params = detail::new_list();
    for (const auto& param : param_groups_[g].params()) {
      if (const auto* state = find_state(param))
        states.insert(index, detail::saved_state(*state, now.states(), now.storage().states == "int8"));
      params.push_back(index++);
    }
    group.insert_or_assign("params", params);
    groups.push_back(group);
  }
  detail::Dict all = detail::new_dict();
  all.insert("state", states);
  all.insert("param_groups", groups);
  return all;
}

void FusedOptimizer::load_state_dict(const c10::IValue& state_dict) {
  own_defaults();
  const detail::StepMode mode;
  const std::string at_load = "[" + name_ + ".load_state_dict]";
  const auto need_dict = [&](const std::string& what, const c10::IValue& value) {
    if (!value.isGenericDict())
      detail::refuse_value(detail::text(at_load, " ", what, " is ", detail::repr(value),
                                        "; expected a dict. Pass what an optimizer's state_dict() returned."));
    return value.toGenericDict();
  };
  const detail::Dict all = need_dict("the state dict", state_dict);
  const auto saved_states = detail::find(all, "state"), saved_groups = detail::find(all, "param_groups");
  if (!saved_states || !saved_groups) {
    std::vector<std::string> keys;
    for (const auto& item : all)
      keys.push_back(item.key().isString() ? item.key().toStringRef() : detail::repr(item.key()));
    std::sort(keys.begin(), keys.end());
    detail::refuse_value(detail::text(at_load, " got a dict with keys ", detail::texts(keys),
                                      "; expected 'state' and 'param_groups'. Pass what an optimizer's state_dict() "
                                      "returned."));
  }
  const auto groups = detail::items_of(*saved_groups).value_or(std::vector<c10::IValue>());
  if (groups.size() != param_groups_.size())
    detail::refuse_value("loaded state dict has a different number of parameter groups");

  // Groups, and each saved index's parameter.
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> new_options;
  std::vector<std::string> warnings;
  std::map<int64_t, std::tuple<at::Tensor, size_t, bool>> owners;  // parameter, group, whether saved in 8 bits
  for (size_t g = 0; g < groups.size(); ++g) {
    const std::string where = detail::text(at_load, " group ", g, ":");
    const detail::Dict saved = need_dict(detail::text("group ", g), groups[g]);
    const auto indices = detail::items_of(detail::find(saved, "params").value_or(c10::IValue()));
    const auto& params = param_groups_[g].params();
    if (!indices || indices->size() != params.size())
      detail::refuse_value(
          "loaded state dict contains a parameter group that doesn't match the size of optimizer's group");
    new_options.push_back(options(g).clone());
    warnings.push_back(detail::read_options(static_cast<Options&>(*new_options.back()), where, name_, saved));
    const auto dtype = detail::find(saved, "state_dtype");
    const bool in_8_bits = dtype && dtype->isString() && detail::storage_name(dtype->toStringRef()) == "int8";
    for (size_t i = 0; i < params.size(); ++i) {
      if (!(*indices)[i].isInt())
        detail::refuse_value(detail::text(where, " params[", i, "] is ", detail::repr((*indices)[i]),
                                          "; expected a whole number. Load an intact checkpoint."));
      owners[(*indices)[i].toInt()] = {params[i], g, in_8_bits};
    }
  }

  // The states of all parameters, and then the same one of each after another, as the steps read them.
  struct Entry {
    std::string where;
    at::Tensor param;
    const Options* group;
    detail::Format format;
    std::unique_ptr<detail::ParamState> state;
  };
  std::vector<Entry> entries;
  std::map<std::string, int64_t> dropped;
  const auto& specs = own_defaults().states();
  for (const auto& item : need_dict("state", *saved_states)) {
    if (!item.key().isInt() || !owners.count(item.key().toInt())) continue;
    const auto& [param, g, in_8_bits] = owners[item.key().toInt()];
    const auto& group = static_cast<const Options&>(*new_options[g]);
    const std::string where = detail::text(at_load, " state[", item.key().toInt(), "]");
    const detail::Dict saved = need_dict(detail::text("state[", item.key().toInt(), "]"), item.value());
    detail::within([&] { return where; },
                   [&, param = param, in_8_bits = in_8_bits] {
                     const auto format = detail::format_of(param, group.storage(), detail::mode_of(group).tensors > 0);
                     entries.push_back({where, param, &group, format,
                                        detail::SavedState(saved, specs, param, in_8_bits, dropped).result()});
                   });
  }
  const auto each = [&](const auto& body) {
    for (Entry& entry : entries) detail::within([&] { return entry.where; }, [&] { body(entry); });
  };
  each([&](Entry& entry) {
    if (!entry.state->step.defined()) return;
    detail::keep_step(*entry.state, entry.param);
    entry.state->step = entry.state->step.clone();
  });
  for (size_t s = 0; s < specs.size(); ++s)
    each([&](Entry& entry) {
      at::Tensor &state = entry.state->states[s], &scales = entry.state->scales[s];
      if (!state.defined()) return;
      const at::Tensor saved = state, saved_scales = scales;
      detail::adapt_state(*entry.state, s, entry.param, specs[s], entry.format);
      if (state.is_same(saved)) state = detail::memory_like(saved, saved.scalar_type()).copy_(saved);
      if (scales.defined() && scales.is_same(saved_scales)) scales = saved_scales.clone();
    });
  each([&](Entry& entry) {  // its weight may be loaded later: the step brings it into the format
    at::Tensor& master = entry.state->master;
    if (!entry.format.has_master) master.reset();
    if (!master.defined()) return;
    detail::check_master(master, entry.param);
    const auto dtype = master.scalar_type() == c10::kShort ? c10::kShort : entry.format.wide;
    master = detail::fitted(master, entry.param, dtype);
  });

  for (const std::string& warning : warnings)
    if (!warning.empty()) TORCH_WARN(warning);
  if (!dropped.empty()) {
    std::string names;
    for (const auto& [name, count] : dropped)
      names += detail::text(names.empty() ? "" : ", ", detail::repr(name), " of ", count, " parameters");
    TORCH_WARN(at_load, " the checkpoint has ", names, ", which ", name_,
               " does not have: dropped. Masters start from the weights. To start from exact ones, save FP32 weights "
               "in the other library and put them into the checkpoint as 'master'.");
  }
  plan_->forget();
  state_.clear();
  for (size_t g = 0; g < groups.size(); ++g) {
    auto& now = static_cast<Options&>(*new_options[g]);
    if (now.rate_tensor().defined()) now.rate_tensor().detach().fill_(now.rate());
    param_groups_[g].set_options(std::move(new_options[g]));
  }
  for (Entry& entry : entries) state_[entry.param.unsafeGetTensorImpl()] = std::move(entry.state);
}

}  // namespace fusedamp::optim
