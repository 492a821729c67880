// The tables of a step, kept for the next one. Each step compares every tensor with what its row was made from, which
// costs nanoseconds: other code may move a parameter, replace a gradient or write a state without a trace.
#pragma once
#include <algorithm>
#include <cstring>

#include "slots.h"

namespace fusedamp::optim::detail {

inline DType dtype_code(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kHalf: return DType::f16;
    case c10::kBFloat16: return DType::bf16;
    case c10::kDouble: return DType::f64;
    case c10::kChar:
    case c10::kByte: return DType::i8;
    case c10::kShort: return DType::i16;
    default: return DType::f32;
  }
}

inline void* address_of(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

// Whether both have the same elements in the same order of memory. `like` is dense, and sizes are equal.
inline bool lies_like(const Tensor& t, const Tensor& like) {
  return like.is_contiguous() ? t.is_contiguous() : t.strides() == like.strides();
}

class Plan {
 public:
  bool is_kept() const { return kept_; }
  void forget() { kept_ = false; }

  // Makes the tables. `batches` with equal rules follow each other. The caller has checked everything.
  void make(const std::vector<Batch>& batches, const std::vector<GroupMode>& modes,
            const std::vector<torch::optim::OptimizerParamGroup>& groups) {
    kept_ = true;
    tables_.clear();
    items_.clear();
    written_.clear();
    for (size_t g = 0; g < groups.size(); ++g)
      for (const Tensor& param : groups[g].params()) items_.push_back(Item(param, g));
    modes_ = modes;
    std::unordered_map<const c10::TensorImpl*, size_t> places;
    for (size_t i = 0; i < items_.size(); ++i) places[items_[i].param] = i;
    for (const Batch& batch : batches) table_on(batch.slots[0]->param.device()).batches.push_back(batch);
    for (Table& table : tables_) {
      fill(table, modes);
      for (const Batch& batch : table.batches)
        for (const Slot* slot : batch.slots) {
          kept_ &= !slot->is_indirect();
          Item& item = items_[places.at(slot->param.unsafeGetTensorImpl())];
          item.state = slot->state;
          item.table = static_cast<size_t>(&table - tables_.data());
          item.row = table.place++;
          item.keys = slot->param.key_set();
          item.has_strides = !slot->param.is_contiguous();
          item.grad_dtype = slot->grad.scalar_type();
          item.lines = lines_of(*slot);
          note_written(*slot, modes[batch.group]);
        }
      table.batches.clear();
    }
    std::sort(written_.begin(), written_.end());
  }

  // Compares groups, parameters, gradients and states with the tables, and takes the gradients' addresses. False if
  // anything else has changed.
  bool matches(const std::vector<torch::optim::OptimizerParamGroup>& groups, const std::vector<GroupMode>& modes,
               const ska::flat_hash_map<void*, std::unique_ptr<torch::optim::OptimizerParamState>>& states) {
    if (!kept_ || !(modes == modes_)) return false;
    bool moved = false;
    size_t i = 0;
    for (size_t g = 0; g < groups.size(); ++g)
      for (const Tensor& param : groups[g].params()) {
        if (i == items_.size() || items_[i].group != g) return false;
        if (i + kAhead < items_.size())
          for (const char* line : items_[i + kAhead].lines) __builtin_prefetch(line);
        if (!same(items_[i++], param, modes[g], states, moved)) return false;
      }
    return i == items_.size() && !(moved && gradients_touch());
  }

  // The tables, in turn: `launch(op, rows, grads, groups, like, device)`.
  template <class Launch>
  void each(const Launch& launch) const {
    for (const Table& table : tables_)
      launch(table.op, table.rows, table.grads, table.groups, table.like, table.device);
  }

  // Writes a group's numbers wherever it is in the tables: `numbers(group, device, StepGroup&)`.
  template <class Numbers>
  void set_numbers(const Numbers& numbers) {
    for (Table& table : tables_)
      for (size_t c = 0; c < table.calls.size(); ++c) numbers(table.calls[c], table.device, table.group(c));
  }

  // Counts the step in the version counters of all parameters that it wrote.
  void bump_versions() const {
    for (const Item& item : items_)
      if (item.state && !item.param->is_inference()) item.param->bump_version();
  }

 private:
  // A parameter, and what its row was made from.
  struct Item {
    Item(const Tensor& t, size_t group) : param(t.unsafeGetTensorImpl()), group(group) {}
    c10::TensorImpl* param;
    size_t group;
    const ParamState* state = nullptr;  // null: no gradient
    size_t table = 0, row = 0;
    c10::DispatchKeySet keys;
    bool has_strides = false;
    c10::ScalarType grad_dtype = c10::kFloat;
    std::vector<const char*> lines;
  };
  struct Table {
    c10::Device device;
    std::string op;
    Tensor rows, grads, groups, like;
    std::vector<size_t> calls;  // each call's group
    std::vector<Batch> batches;
    size_t place = 0;

    StepRow* row(size_t i) const { return static_cast<StepRow*>(rows.data_ptr()) + i; }
    StepGroup& group(size_t c) const { return static_cast<StepGroup*>(groups.data_ptr())[c]; }
    void** grad(size_t i) const { return static_cast<void**>(grads.data_ptr()) + i; }
  };

  Table& table_on(c10::Device device) {
    for (Table& table : tables_)
      if (table.device == device) return table;
    tables_.push_back({device, "", {}, {}, {}, {}, {}, {}, 0});
    return tables_.back();
  }

  static Tensor words(int64_t n) { return at::zeros({n}, at::TensorOptions(at::kCPU).dtype(at::kLong)); }

  static void fill(Table& table, const std::vector<GroupMode>& modes) {
    std::stable_sort(table.batches.begin(), table.batches.end(), [&](const Batch& a, const Batch& b) {
      return modes[a.group].rule < modes[b.group].rule;  // consecutive calls of one rule share a pass
    });
    int64_t n = 0;
    for (const Batch& batch : table.batches) n += static_cast<int64_t>(batch.slots.size());
    table.op = modes[table.batches[0].group].op;
    table.rows = words(n * static_cast<int64_t>(sizeof(StepRow) / 8));
    table.grads = words(n);
    table.groups = words(static_cast<int64_t>(table.batches.size() * sizeof(StepGroup) / 8));
    table.like = at::empty({0}, at::TensorOptions(table.device));
    size_t place = 0;
    for (size_t c = 0; c < table.batches.size(); ++c) {
      const Batch& batch = table.batches[c];
      const GroupMode& mode = modes[batch.group];
      StepGroup group = {};
      group.first = static_cast<int64_t>(place);
      group.count = static_cast<int64_t>(batch.slots.size());
      group.rule = static_cast<int32_t>(mode.rule);
      group.lr_dtype = DType::f32;
      table.group(c) = group;
      table.calls.push_back(batch.group);
      for (const Slot* slot : batch.slots) {
        *table.row(place) = row_of(*slot, mode, static_cast<int32_t>(c), batch.has_masters);
        *table.grad(place++) = address_of(slot->grad);
      }
    }
  }

  static StepRow row_of(const Slot& slot, const GroupMode& mode, int32_t group, bool has_master) {
    StepRow row = {};
    row.param = address_of(slot.target);
    if (has_master) row.master = address_of(slot.state->master);
    const bool wide = slot.target.scalar_type() == c10::kDouble;
    row.state_dtype = wide ? DType::f64 : DType::f32;
    for (size_t k = 0; k < mode.used.size(); ++k) {
      const Tensor& state = slot.state->states[mode.used[k]];
      const Tensor& scales = slot.state->scales[mode.used[k]];
      row.states[k] = address_of(state);
      // Scales are in the order of the 8-bit states, which come first.
      if (scales.defined()) row.scales[k] = static_cast<float*>(scales.data_ptr());
      if (k < mode.tensors) row.state_dtype = dtype_code(as_real(state).scalar_type());
    }
    row.step = static_cast<float*>(slot.state->step.data_ptr());
    row.numel = slot.target.numel();
    row.seed = mode.storage.draws() ? slot.seed : 0;
    row.group = group;
    row.grad_dtype = dtype_code(slot.grad.scalar_type());
    row.param_dtype = dtype_code(slot.target.scalar_type());
    row.master_dtype = has_master ? dtype_code(as_real(slot.state->master).scalar_type()) : DType::f32;
    row.maximize = mode.maximize;
    row.stochastic = mode.storage.stochastic;
    return row;
  }

  // The cache lines that same() reads, except a new gradient's. After a backward pass few of them are in a cache, and
  // one read would wait for the other. They are prefetched only: one that is out of date costs time, and nothing else.
  static std::vector<const char*> lines_of(const Slot& slot) {
    std::vector<const char*> lines;
    const auto add = [&](const void* object, size_t bytes) {
      for (size_t at = 0; at < bytes; at += 64) lines.push_back(static_cast<const char*>(object) + at);
    };
    const auto add_tensor = [&](const Tensor& t) {
      if (!t.defined()) return;
      add(t.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
      add(t.storage().unsafeGetStorageImpl(), 1);
    };
    add(slot.state, sizeof(ParamState));
    add(slot.param.unsafeGetTensorImpl()->autograd_meta(), 1);
    add_tensor(slot.param);
    add_tensor(slot.grad);
    add_tensor(slot.state->step);
    add_tensor(slot.state->master);
    for (const Tensor& state : slot.state->states) add_tensor(state);
    for (const Tensor& scales : slot.state->scales) add_tensor(scales);
    return lines;
  }

  void note_written(const Slot& slot, const GroupMode& mode) {
    const auto add = [&](const Tensor& t) {
      if (!t.defined() || t.numel() == 0) return;
      const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
      written_.emplace_back(begin, begin + static_cast<uintptr_t>(t.nbytes()));
    };
    add(slot.target);
    add(slot.state->master);
    add(slot.state->step);
    for (const size_t s : mode.used) {
      add(slot.state->states[s]);
      add(slot.state->scales[s]);
    }
  }

  bool same(Item& item, const Tensor& param, const GroupMode& mode,
            const ska::flat_hash_map<void*, std::unique_ptr<torch::optim::OptimizerParamState>>& states,
            bool& moved) const {
    const Tensor& grad = param.grad();
    if (param.unsafeGetTensorImpl() != item.param || grad.defined() != (item.state != nullptr)) return false;
    if (!item.state) return true;
    const Table& table = tables_[item.table];
    const StepRow& row = *table.row(item.row);
    const auto has = [&](const Tensor& t, const void* address, DType dtype) {
      return t.defined() && t.data_ptr() == address && t.numel() == row.numel && lies_like(t, param) &&
             t.device() == table.device && dtype_code(t.scalar_type()) == dtype;
    };
    if (param.key_set() != item.keys || param.is_contiguous() == item.has_strides ||
        !has(param, row.param, row.param_dtype))
      return false;
    const auto found = states.find(item.param);
    if (found == states.end() || found->second.get() != item.state) return false;
    const ParamState& state = *item.state;
    const auto scalar = [&](const Tensor& t, const void* address, c10::ScalarType dtype) {
      return t.defined() && t.data_ptr() == address && t.numel() == 1 && t.scalar_type() == dtype &&
             t.device() == table.device;
    };
    if (!scalar(state.step, row.step, c10::kFloat)) return false;
    if (row.master ? !has(state.master, row.master, row.master_dtype) : state.master.defined() && row.numel > 0)
      return false;
    for (size_t k = 0; k < mode.used.size(); ++k) {
      const Tensor &one = state.states[mode.used[k]], &scales = state.scales[mode.used[k]];
      if (k < mode.tensors ? !has(one, row.states[k], row.state_dtype) : !scalar(one, row.states[k], c10::kDouble))
        return false;
      if (address_of(scales) != row.scales[k]) return false;
      if (scales.defined() && (scales.numel() != scale_count(row.numel) || scales.scalar_type() != c10::kFloat))
        return false;
    }
    if (grad.scalar_type() != item.grad_dtype || grad.key_set() != item.keys || grad.device() != table.device ||
        grad.sizes() != param.sizes() || !lies_like(grad, param))
      return false;
    void*& column = *table.grad(item.row);
    if (column != grad.data_ptr()) {
      column = grad.data_ptr();
      moved = true;
    }
    return true;
  }

  // Whether a gradient lies in memory that the step writes.
  bool gradients_touch() const {
    for (const Table& table : tables_)
      for (size_t i = 0; i < table.place; ++i) {
        const auto begin = reinterpret_cast<uintptr_t>(*table.grad(i));
        const StepRow& row = *table.row(i);
        if (row.numel == 0) continue;
        const uintptr_t end = begin + static_cast<uintptr_t>(row.numel * size_of(row.grad_dtype));
        auto after = std::lower_bound(written_.begin(), written_.end(), std::make_pair(end, uintptr_t{0}));
        if (after != written_.begin() && std::prev(after)->second > begin) return true;
      }
    return false;
  }

  static constexpr size_t kAhead = 8;  // parameters between a prefetch and its use

  bool kept_ = false;
  std::vector<Item> items_;
  std::vector<Table> tables_;
  std::vector<GroupMode> modes_;
  std::vector<std::pair<uintptr_t, uintptr_t>> written_;  // begin and end, sorted
};

}  // namespace fusedamp::optim::detail
