// Tables of addresses that fusedamp's own Python made, in int64 tensors on the CPU. Whether an address is the right one
// only it knows, and it keeps the memory alive; dtypes, counts and missing addresses are checked here once more.
#pragma once
#include "rows.h"

namespace fusedamp {

// [3, n]: addresses, numels and dtype codes of gradients.
std::vector<GradRow> packed_grad_rows(const std::string& op, const Tensor& rows);

// Step rows and groups as the engines have them (engine/table.h), in the tensors' own memory.
struct PlannedStep {
  std::string op;  // the first group's
  StepTable table;
  StepGroups groups;
};
// Checks the tables as a whole. _check_plan has checked each row.
PlannedStep planned_step(const Tensor& rows, const Tensor& grads, const Tensor& groups);

StepLog step_log(const std::string& op, const Tensor& like, const OptionalTensor& counts,
                 const OptionalTensor& log_counts, const OptionalTensor& log_step, const OptionalTensor& log_steps);

// The op _check_plan.
void check_plan(Tensor rows, Tensor groups, Tensor like);

}  // namespace fusedamp
