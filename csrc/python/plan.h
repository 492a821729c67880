// One walk per step over an optimizer's groups, parameters and gradients.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace fusedamp {

// What the last step saw. The tables of a step op (csrc/engine/table.h) are the caller's memory: the walk writes the
// gradients' addresses into their column, and a new learning rate into its group.
class Plan {
 public:
  // groups: param_groups of an optimizer. columns: for each parameter of all groups, in order, the address of its place
  // in the column of gradients, or 0 if it has no gradient. kinds: of each, numel and dtype of the gradient. rates: for
  // each group the addresses of its learning rate in the tables.
  // Throws ValueError where a parameter is not plain.
  Plan(pybind11::list groups, const std::vector<int64_t>& columns,
       const std::vector<std::pair<int64_t, int64_t>>& kinds, const std::vector<std::vector<int64_t>>& rates);

  // The walk. None where more than gradients and options has changed: other groups or parameters, a parameter that has
  // moved, a gradient that came, went or changed its size or type. Else the groups whose options are others than were
  // noted; a new learning rate that is a float is written to the tables, and is no such change.
  // `versioned`: with version counters, for mark() and is_as_marked().
  pybind11::object look(pybind11::list groups, bool versioned);

  // Notes the present options of a group. Such as can change in place (tensors, lists) are reported by every look().
  void note_options(size_t index, pybind11::dict group);

  // Whether the gradients' addresses are those of the last call; notes them.
  bool gradients_moved();

  // Remembers the gradients that the last look(versioned) saw; returns the number of this mark.
  int64_t mark();
  // Whether the last look(versioned) saw the gradients of that mark: the same tensors, not written since. Who asks must
  // have kept them alive.
  bool is_as_marked(int64_t mark) const;

 private:
  struct Item {
    PyObject* object;  // borrowed: the group has it
    KnownParam param;
    int64_t* column;  // null: no gradient
    int64_t numel, dtype;
    int64_t address;  // of the gradient, as it was last noted
  };
  struct Option {
    pybind11::object name, value;
  };
  struct Group {
    size_t params;
    std::vector<Option> options;
    bool is_fixed = false;  // whether the options can't change in place
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
