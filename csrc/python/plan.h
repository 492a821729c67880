// One pass per step over an optimizer's groups, parameters and gradients.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace fusedamp {

// Snapshot of the last step. The tables of a step op (csrc/engine/table.h) are the caller's memory: look() writes the
// gradients' addresses into their column, and a new learning rate into its group.
class Plan {
 public:
  // groups: param_groups of an optimizer. columns: for each parameter of all groups, in order, the address of its entry
  // in the column of gradients, or 0 without a gradient. kinds: numel and dtype of each gradient. rates: for each
  // group, the addresses of its learning rate in the tables.
  // Throws ValueError if a parameter is not plain.
  Plan(pybind11::list groups, const std::vector<int64_t>& columns,
       const std::vector<std::pair<int64_t, int64_t>>& kinds, const std::vector<std::vector<int64_t>>& rates);

  // Compares everything with the snapshot. Returns None if anything but gradients and options changed: groups or
  // parameters, a parameter's address, the presence, size or type of a gradient. Otherwise returns the groups whose
  // options differ from the recorded ones; a new learning rate that is a float is written to the tables and not
  // reported.
  // `versioned`: also read version counters, for mark() and is_as_marked().
  pybind11::object look(pybind11::list groups, bool versioned);

  // Records the current options of a group. Every look() reports groups with mutable options (tensors, lists).
  void note_options(size_t index, pybind11::dict group);

  // True if the gradients' addresses changed since the last call; records them.
  bool gradients_moved();

  // Records the gradients of the last versioned look(); returns the number of this mark.
  int64_t mark();
  // True if the last versioned look() found the gradients of that mark: the same tensors, unmodified. The caller must
  // keep them alive.
  bool is_as_marked(int64_t mark) const;

 private:
  struct Item {
    PyObject* object;  // borrowed: the group has it
    KnownParam param;
    int64_t* column;  // null: no gradient
    int64_t numel, dtype;
    int64_t address;  // last recorded address of the gradient
  };
  struct Option {
    pybind11::object name, value;
  };
  struct Group {
    size_t params;
    std::vector<Option> options;
    bool is_fixed = false;  // whether all options are immutable
    std::vector<double*> rates;
  };
  struct Stamp {
    const void* identity;
    int64_t version;
    bool operator==(const Stamp& other) const { return identity == other.identity && version == other.version; }
  };

  bool has_same_options(Group& group, PyObject* dict);
  bool find(Item& item, bool versioned, Stamp* stamp);

  std::vector<Item> items_;
  std::vector<Group> groups_;
  std::vector<Stamp> seen_, marked_;
  int64_t mark_ = 0;
};

}  // namespace fusedamp
