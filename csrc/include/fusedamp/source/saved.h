// The state of one parameter as checkpoints hold it, in the form of fusedamp's Python (optim/state/saved.py): an 8-bit
// state contiguous in the order of memory, with its block scales, size and order; a split master's remainder as bytes.
#pragma once
#include <map>

#include "numbers.h"
#include "state.h"

namespace fusedamp::optim::detail {

// The dimensions of a dense tensor as its memory has them, the outermost first.
inline std::vector<int64_t> order_of(const Tensor& dense) {
  std::vector<int64_t> order(static_cast<size_t>(dense.dim()));
  for (size_t d = 0; d < order.size(); ++d) order[d] = static_cast<int64_t>(d);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return dense.stride(a) > dense.stride(b); });
  return order;
}

inline Dict saved_state(const ParamState& state, const std::vector<StateSpec>& specs, bool in_8_bits) {
  Dict saved = new_dict();
  for (const auto& [name, value] : state.others) saved.insert(name, value);
  if (state.step.defined()) saved.insert("step", state.step);
  for (size_t s = 0; s < specs.size(); ++s) {
    const std::string name = specs[s].name;
    const Tensor& value = state.states[s];
    if (!value.defined()) continue;
    if (specs[s].scalar || !is_8bit(value)) {
      saved.insert(name, value);
      // A size of 0 tells floats from quantized values that other code has cast.
      if (!specs[s].scalar && in_8_bits) saved.insert(name + "_numel", int64_t{0});
      continue;
    }
    const auto order = order_of(value);
    int64_t number = 1;
    for (const int64_t dim : order) number = 64 * number + dim;
    saved.insert(name, value.is_contiguous() ? value : value.permute(order).reshape(value.sizes()));
    saved.insert(name + "_scale", state.scales[s]);
    saved.insert(name + "_numel", value.numel());
    saved.insert(name + "_order", number);
  }
  if (state.master.defined()) {
    const bool is_split = state.master.scalar_type() == c10::kShort;
    saved.insert("master", is_split ? state.master.unsqueeze(-1).view(at::kByte) : state.master);
    if (is_split) saved.insert("master_numel", state.master.numel());
  }
  return saved;
}

// The view of `saved`, contiguous in the order of memory, that has the order `number` again.
inline Tensor in_order(const Tensor& saved, int64_t number) {
  std::vector<int64_t> order;
  for (; number > 1; number /= 64) order.insert(order.begin(), number % 64);
  std::vector<int64_t> sorted = order, back(order.size()), sizes;
  std::sort(sorted.begin(), sorted.end());
  bool good = static_cast<int64_t>(order.size()) == saved.dim();
  for (size_t d = 0; good && d < sorted.size(); ++d) good = sorted[d] == static_cast<int64_t>(d);
  if (!good)
    refuse_value(text("has an 8-bit state of shape ", list_text(saved.sizes()), " with the order ", list_text(order),
                      " of dimensions; expected each once. Load an intact checkpoint."));
  for (size_t d = 0; d < order.size(); ++d) {
    sizes.push_back(saved.size(order[d]));
    back[static_cast<size_t>(order[d])] = static_cast<int64_t>(d);
  }
  return saved.contiguous().view(sizes).permute(back);
}

// Reads the entry of one parameter. Tensors still share memory with it.
class SavedState {
 public:
  // `dropped`: how many tensors of other libraries were left out, by name.
  SavedState(const Dict& entry, const std::vector<StateSpec>& specs, const Tensor& param, bool in_8_bits,
             std::map<std::string, int64_t>& dropped)
      : specs_(specs), in_8_bits_(in_8_bits), made_(std::make_unique<ParamState>(param)), dropped_(dropped) {
    for (const auto& item : entry)
      if (!item.value().isNone()) entry_.emplace(item.key().toStringRef(), item.value());
    check_required();
    take_step();
    for (size_t s = 0; s < specs.size(); ++s) take_state(s);
    take_master(param);
    for (const auto& [name, value] : entry_) keep_other(name, value, param);
  }

  std::unique_ptr<ParamState> result() { return std::move(made_); }

 private:
  std::optional<c10::IValue> take(const std::string& name) {
    const auto found = entry_.find(name);
    if (found == entry_.end()) return std::nullopt;
    const c10::IValue value = found->second;
    entry_.erase(found);
    return value;
  }

  static Tensor need_tensor(const std::string& name, const c10::IValue& value) {
    if (!value.isTensor())
      refuse_type(
          text("has state ", repr(name), " of type ", kind_of(value), "; expected a tensor. Pass a state_dict()."));
    return value.toTensor().detach();
  }

  // Entries of other code stay, but for what other libraries store to make 16-bit weights more precise.
  void keep_other(const std::string& name, const c10::IValue& value, const Tensor& param) {
    if (name == "error_bits" || name == "kahan_comp" || name == "compensation") {
      if (value.isTensor()) ++dropped_[name];
    } else if (value.isTensor()) {
      const Tensor t = value.toTensor().detach();
      made_->others.emplace_back(name, t.to(param.device(), t.scalar_type(), false, true));
    } else {
      made_->others.emplace_back(name, value);
    }
  }

  void check_required() {
    std::vector<std::string> present, required, missing;
    bool counts = false;
    for (const auto& item : entry_) present.push_back(item.first);
    for (const auto& spec : specs_) {
      if (spec.count >= 0.0 && entry_.count(spec.name)) entry_.emplace("step", spec.count);
      counts |= spec.required && spec.count < 0.0;
      if (spec.required) required.push_back(spec.name);
    }
    if (counts) required.insert(required.begin(), "step");
    for (const auto& name : required)
      if (!entry_.empty() && !entry_.count(name)) missing.push_back(name);
    if (!missing.empty())
      refuse_value(text("has ", texts(present), ", without ", texts(missing), "; expected all of ", texts(required),
                        ". Load a checkpoint of this optimizer."));
  }

  void take_step() {
    const auto step = take("step");
    if (!step) return;
    if (step->isTensor()) {
      made_->step = step->toTensor().detach();
      return;
    }
    if (!is_number(*step) || !is_count(number_of(*step))) refuse_count(repr(*step));
    made_->step = at::full({}, number_of(*step), at::kFloat);
  }

  void take_state(size_t s) {
    const StateSpec& spec = specs_[s];
    const std::string name = spec.name;
    const auto value = take(name), scales = take(name + "_scale"), numel = take(name + "_numel"),
               order = take(name + "_order");
    if (value && spec.scalar && is_number(*value)) {  // torch's NAdam before 2.0 saved a float
      made_->states[s] = at::full({}, number_of(*value), at::kDouble);
      return;
    }
    Tensor t = value ? need_tensor(name, *value) : Tensor();
    const bool quantized = t.defined() && is_8bit(t);
    if (scales && !quantized)
      refuse_value(text("has ", repr(name + "_scale"), ", the block scales of an 8-bit state, beside ", repr(name),
                        " of dtype ", t.defined() ? torch_name(t) : "missing",
                        "; expected its int8 or uint8 values. Quantized values must not be cast or computed with: ",
                        "load the intact checkpoint into an optimizer with state_dtype=\"float32\" for that."));
    if (!t.defined()) return;
    const bool was_8_bits = numel ? numel->toInt() != 0 : in_8_bits_;
    if (!quantized && !spec.scalar && was_8_bits)
      refuse_value(text("has state ", repr(name), " of dtype ", torch_name(t),
                        ", which was saved in 8 bits; expected its int8 or uint8 values and their block scales. ",
                        "torch.distributed.checkpoint casts quantized values to the states of the optimizer that ",
                        "loads: load into one with state_dtype=\"int8\" and shards like those saved, or into ",
                        "unsharded parameters, and its state_dict() into this one. If the values are numbers of your ",
                        "own, save ", repr(name + "_numel"), " as 0."));
    if (quantized) {
      made_->scales[s] = scales && scales->isTensor() ? scales->toTensor().detach() : Tensor();
      check_quantized(spec, t, made_->scales[s], numel ? numel->toInt() : t.numel());
      if (order) t = in_order(t, order->toInt());
    }
    made_->states[s] = t;
  }

  static void check_quantized(const StateSpec& spec, const Tensor& t, const Tensor& scales, int64_t numel) {
    const std::string name = spec.name;
    check_scales(spec.name, t, scales);
    const auto wanted = spec.nonnegative ? c10::kByte : c10::kChar;
    if (t.scalar_type() != wanted)
      refuse_value(text("has 8-bit state ", repr(name), " of dtype ", torch_name(t), "; expected torch.",
                        name_of(wanted), ", as it ", spec.nonnegative ? "never is" : "may be",
                        " negative. Pass what state_dict() returned."));
    if (numel != t.numel())
      refuse_value(text("has 8-bit state ", repr(name), " of ", t.numel(), " elements, which was saved with ", numel,
                        "; expected all of them, as their block scales belong to their places. To add or remove ",
                        "elements, load the checkpoint into an optimizer with state_dtype=\"float32\", whose states ",
                        "are numbers."));
    const Tensor powers = (scales.view(at::kInt).bitwise_and(0x7FFFFF)).eq(0).logical_and(scales.ge(0));
    if (!powers.logical_or(scales.isnan()).all().item<bool>())
      refuse_value(text("has 8-bit state ", repr(name), " with ", repr(name + "_scale"),
                        " that are no powers of two; expected the scales that were saved with it. Scales can't be ",
                        "averaged or cast: do so with the states of an optimizer with state_dtype=\"float32\"."));
  }

  void take_master(const Tensor& param) {
    const auto value = take("master"), numel = take("master_numel");
    if (!value) return;
    Tensor t = need_tensor("master", *value);
    auto as_bytes = param.sizes().vec();
    as_bytes.push_back(2);
    if (t.scalar_type() == c10::kByte && t.sizes() == c10::IntArrayRef(as_bytes))
      t = t.contiguous().clone().view(at::kShort).squeeze(-1);
    if (numel && !(t.scalar_type() == c10::kShort && t.numel() == numel->toInt()))
      refuse_value(text("has a master of dtype ", torch_name(t), " and shape ", list_text(t.sizes()),
                        ", saved as the remainder of a split one of ", numel->toInt(),
                        " elements; expected its unchanged bytes, torch.uint8 of shape ", list_text(as_bytes),
                        ". Load the intact checkpoint, or remove 'master' from it: it is created from the weight."));
    made_->master = t;
  }

  const std::vector<StateSpec>& specs_;
  const bool in_8_bits_;
  std::unique_ptr<ParamState> made_;
  std::map<std::string, c10::IValue> entry_;
  std::map<std::string, int64_t>& dropped_;
};

}  // namespace fusedamp::optim::detail
