// One parameter of a step: the tensors that the op takes, and what is wrong with them.
#pragma once
#include <algorithm>
#include <functional>
#include <unordered_map>
#include <unordered_set>

#include "state.h"

namespace fusedamp::optim::detail {

// What a step needs to know of a group's options.
struct GroupMode {
  std::string op;
  int64_t rule = 0;
  std::vector<size_t> used;  // states, by their places in Options::states()
  size_t tensors = 0;        // how many of these are like the parameter; the others, one element each, follow
  Storage storage;
  bool maximize = false;

  bool operator==(const GroupMode& other) const {
    return op == other.op && used == other.used && storage == other.storage && maximize == other.maximize;
  }
};

struct Slot {
  Tensor param;
  size_t group = 0;
  int64_t index = 0, seed = 0;
  Format format = {};
  ParamState* state = nullptr;
  // In the form that the op takes: real, dense, with equal strides. `dense` is `param` or, if that has gaps, a copy.
  Tensor dense, target, grad;

  bool is_copy() const { return !dense.is_same(param); }
  // Whether the op's tensors are views or copies, so that the next step needs new ones.
  bool is_indirect() const { return !target.is_same(param); }
};

inline Tensor as_real(const Tensor& t) { return t.is_complex() ? at::view_as_real(t) : t; }

// A defined gradient in the form of `slot`. Throws if it does not fit the parameter.
inline Tensor paired(const Slot& slot, const Tensor& grad) {
  const Tensor& param = slot.param;
  const auto kind = grad.scalar_type();
  const bool known = c10::isFloatingType(kind) || c10::isComplexType(kind);
  if (grad.sizes() != param.sizes() || grad.device() != param.device() || !known || grad.element_size() < 2 ||
      grad.is_complex() != param.is_complex() || c10::elementSize(kind) > c10::elementSize(slot.format.wide))
    refuse_value(text("has a gradient of shape ", list_text(grad.sizes()), ", ", torch_name(grad), " on ",
                      grad.device().str(), "; expected shape ", list_text(param.sizes()), ", torch.",
                      name_of(slot.format.wide), " or narrower on ", param.device().str(), ". Cast it."));
  return as_real(strided_like(grad.detach().resolve_conj().resolve_neg(), slot.dense));
}

inline int64_t reach_of(const Tensor& t) {  // bytes from the first element to the end of the last
  int64_t steps = 0;
  for (int64_t d = 0; d < t.dim(); ++d) steps += (t.size(d) - 1) * t.stride(d);
  return (steps + 1) * static_cast<int64_t>(t.element_size());
}

// Whether two tensors whose ranges overlap have an element in the same memory; `first` begins first.
inline bool share_an_element(const Tensor& first, const Tensor& second) {
  const int64_t size = static_cast<int64_t>(first.element_size());
  const int64_t distance = static_cast<const char*>(second.data_ptr()) - static_cast<const char*>(first.data_ptr());
  if (size != static_cast<int64_t>(second.element_size()) || distance % size != 0) return true;
  const int64_t reach = std::max(reach_of(first), distance + reach_of(second)) / size;
  Tensor seen = at::zeros({reach}, at::kBool);
  seen.as_strided(first.sizes(), first.strides()).fill_(true);
  return seen.as_strided(second.sizes(), second.strides(), distance / size).any().item<bool>();
}

// Throws if two parameters share memory: an op that updates both at the same time would race.
inline void check_aliasing(const std::string& name, const std::vector<Slot>& slots) {
  struct Range {
    std::string device;
    uintptr_t begin, end;
    const Tensor* tensor;
  };
  std::vector<Range> ranges;
  for (const Slot& slot : slots) {
    if (slot.param.numel() == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(slot.param.data_ptr());
    ranges.push_back(
        {slot.param.device().str(), begin, begin + static_cast<uintptr_t>(reach_of(slot.param)), &slot.param});
  }
  std::stable_sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::tie(a.device, a.begin, a.end) < std::tie(b.device, b.begin, b.end);
  });
  std::vector<Range> open;  // those that may overlap later ones
  for (const Range& range : ranges) {
    open.erase(std::remove_if(open.begin(), open.end(),
                              [&](const Range& r) { return r.device != range.device || r.end <= range.begin; }),
               open.end());
    for (const Range& one : open)
      if (share_an_element(*one.tensor, *range.tensor)) {
        refuse_value(text("[", name, "] two parameters share memory at 0x", std::hex, range.begin, " on ", range.device,
                          "; expected disjoint. Tie weights by using one Parameter object, and pass it once."));
      }
    open.push_back(range);
  }
}

// One call of a step op: parameters of one group, on one device, all with masters or all without.
struct Batch {
  size_t group;
  bool has_masters;
  std::vector<const Slot*> slots;

  StepLists lists(const GroupMode& mode) const {
    StepLists s;
    s.op = mode.op;
    s.maximize = mode.maximize;
    s.stochastic_rounding = mode.storage.stochastic;
    for (const Slot* slot : slots) {
      s.params.push_back(slot->target);
      s.grads.push_back(slot->grad);
      s.steps.push_back(slot->state->step);
      if (has_masters) s.masters.push_back(as_real(slot->state->master));
      if (mode.storage.draws()) s.seeds.push_back(slot->seed);
    }
    for (const size_t state : mode.used)
      for (const Slot* slot : slots) s.states.push_back(as_real(slot->state->states[state]));
    for (const size_t state : mode.used)
      for (const Slot* slot : slots)
        if (slot->state->scales[state].defined()) s.scales.push_back(slot->state->scales[state]);
    return s;
  }
};

// An op has one list of states; the user knows them by name: "states[5]" becomes "exp_avg_sqs[1]".
inline std::string with_state_names(std::string message, const GroupMode& mode, const std::vector<StateSpec>& specs,
                                    size_t params) {
  const std::string word = "states[";
  for (size_t at = message.find(word); at != std::string::npos; at = message.find(word, at + 1)) {
    const bool starts =
        at == 0 || !(std::isalnum(static_cast<unsigned char>(message[at - 1])) || message[at - 1] == '_');
    const size_t end = message.find(']', at);
    if (!starts || end == std::string::npos) continue;
    const size_t place = std::stoul(message.substr(at + word.size(), end - at - word.size()));
    if (place / params >= mode.used.size()) continue;
    message.replace(at, end + 1 - at, text(specs[mode.used[place / params]].name, "s[", place % params, "]"));
  }
  return message;
}

// Throws what one of the calls would be refused for, or all of them together; changes nothing.
inline void check_batches(const std::vector<Batch>& batches, const std::vector<GroupMode>& modes,
                          const std::vector<StateSpec>& specs,
                          const std::function<void(const Batch&, StepLists&)>& add_numbers,
                          const std::function<StepInputs(c10::Device)>& inputs) {
  Tensors written, read;
  for (const Batch& batch : batches) {
    StepLists lists = batch.lists(modes[batch.group]);
    add_numbers(batch, lists);
    try {
      check_step(lists, inputs(batch.slots[0]->param.device()));
    } catch (const c10::ValueError& error) {
      refuse_value(with_state_names(error.what_without_backtrace(), modes[batch.group], specs, batch.slots.size()));
    }
    for (const Tensors* some : {&lists.params, &lists.masters, &lists.steps, &lists.scales, &lists.states})
      written.insert(written.end(), some->begin(), some->end());
    read.insert(read.end(), lists.grads.begin(), lists.grads.end());
  }
  if (batches.size() < 2) return;
  const auto count = static_cast<int64_t>(written.size());
  written.insert(written.end(), read.begin(), read.end());
  const auto [one, two] = find_shared_memory(written, count);
  if (one >= 0)
    refuse_value(text(
        "[", modes[batches[0].group].op, "] a ", one < count ? "tensor that a group writes" : "gradient", " of shape ",
        list_text(written[one].sizes()), " shares memory with a ",
        two < count ? "tensor that another group writes" : "gradient", " of shape ", list_text(written[two].sizes()),
        "; expected memory of its own for all that the step writes. Pass each tensor once, or a clone()"));
}

}  // namespace fusedamp::optim::detail
