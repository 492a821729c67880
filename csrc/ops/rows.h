// From torch tensors to the engines' rows: every check of an op's tensors, with messages that name the op, the index,
// what it got, what it wanted and the way out. Throws before anything is changed.
#pragma once
#include <tuple>

#include "../math/rules.h"
#include "checks.h"

namespace fusedamp {

// The lists of a step op as it received them. states: all first states, then all second ones, and so on; a rule's
// scalars last, fp64 of one element. scales, of 8-bit states, likewise.
struct StepLists {
  const Tensors &params, &grads, &masters, &states, &steps, &scales;
  const std::vector<int64_t>&seeds, &places;
  const OptionalTensor &squares, &updates, &due;
};

// What the rows of a call share.
struct GroupFlags {
  bool maximize, stochastic;
};

// A step's tables: rows, and the gradients' addresses in a column of their own.
struct StepRows {
  std::vector<StepRow> rows;
  std::vector<void*> grads;
};
StepRows step_rows(const std::string& op, RuleId rule, const StepLists& lists, GroupFlags flags);
std::vector<GradRow> grad_rows(const std::string& op, const Tensors& grads, bool written = false);

// What a gradient check writes beside its results: of `rows`, on the device of `like`. Throws if that shares memory
// with the gradients, or with `reads` (name and tensor, which may be missing).
using Reads = std::vector<std::pair<const char*, OptionalTensor>>;
Numerics numerics_of(const std::string& op, const std::vector<GradRow>& rows, const Tensor& like,
                     const Tensor& extremes, const Tensor& histogram, const Tensor& due, const Reads& reads);

// Throws unless every step count is a whole number from 0 to 2^62. For counts that the host can read.
void need_counts(const std::string& op, const StepRow* rows, int64_t count);

// The address of a one-element fp32 tensor on `like`'s device; null where there is none.
float* scalar_at(const std::string& op, const char* name, const OptionalTensor& scalar, const Tensor& like);
int32_t* int_scalar_at(const std::string& op, const char* name, const OptionalTensor& scalar, const Tensor& like);

// Which update rule the op's number of states per tensor asks for.
RuleId rule_for(const std::string& op, size_t params, size_t states);

// The op that has this rule, and the names of what is in its `hyper`, in order, separated by blanks.
std::string op_of(int32_t rule);
std::string hyper_names(std::string op);

// The numbers of a call's only group; its rule and rows are not in it yet.
StepGroup step_group(const std::string& op, const Tensor& like, double lr, const std::vector<double>& hyper,
                     const OptionalTensor& lr_tensor);
StepScalars step_scalars(const std::string& op, const Tensor& like, const OptionalTensor& inv_scale,
                         const OptionalTensor& clip_coef, const OptionalTensor& found_inf);

// `count`: of the step's rows.
Tally step_tally(const std::string& op, const Tensor& like, int64_t count, const OptionalTensor& updates,
                 const OptionalTensor& due);

// A step op's arguments, all of them checked: nothing can be refused any more.
struct CheckedStep {
  StepGroup group;
  StepScalars scalars;
  StepRows rows;
  Tally tally;
};
CheckedStep checked_step(const std::string& op, const StepLists& lists, double lr, const std::vector<double>& hyper,
                         bool maximize, const OptionalTensor& lr_tensor, const OptionalTensor& inv_scale,
                         const OptionalTensor& clip_coef, const OptionalTensor& found_inf, bool stochastic_rounding);

// The ops _check_step and _find_shared_memory (schemas.h), the same on every device.
void check_step(Tensors params, Tensors grads, Tensors masters, Tensors states, Tensors steps, Tensors scales,
                std::string op, double lr, std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor,
                OptionalTensor inv_scale, OptionalTensor clip_coef, OptionalTensor found_inf,
                std::vector<int64_t> seeds, bool stochastic_rounding, std::vector<int64_t> places,
                OptionalTensor squares, OptionalTensor updates, OptionalTensor due);
std::tuple<int64_t, int64_t> find_shared_memory(Tensors tensors, int64_t written);

}  // namespace fusedamp
