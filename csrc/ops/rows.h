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
  const std::vector<int64_t>& seeds;
};

std::vector<StepRow> step_rows(const std::string& op, RuleId rule, const StepLists& lists);
std::vector<GradRow> grad_rows(const std::string& op, const Tensors& grads, bool written = false);

// Rows that Python packed into int64 tensors on the CPU, of tensors that it has checked and keeps alive. Whether an
// address is the right one only it knows; dtypes, counts and missing addresses are checked here once more.
// Step rows, [n, 12]: param, master (or 0), three states (or 0), their scales (or 0), step, numel, seed, and the dtypes
// of param, gradient, master and states, 8 bits each from the lowest; grads, [n]. Gradient rows, [n, 3]: gradient,
// numel, dtype.
std::vector<StepRow> packed_step_rows(const std::string& op, RuleId rule, const Tensor& rows, const Tensor& grads);
std::vector<GradRow> packed_grad_rows(const Tensor& rows);

// Throws unless every step count is a whole number from 0 to 2^62. For counts that the host can read.
void need_counts(const std::string& op, const std::vector<StepRow>& rows);

// The address of a one-element fp32 tensor on `like`'s device; null where there is none.
float* scalar_at(const std::string& op, const char* name, const OptionalTensor& scalar, const Tensor& like);
int32_t* int_scalar_at(const std::string& op, const char* name, const OptionalTensor& scalar, const Tensor& like);

// Which update rule the op's number of states per tensor asks for.
RuleId rule_for(const std::string& op, size_t params, size_t states);

StepScalars step_scalars(const std::string& op, const Tensor& like, double lr, const std::vector<double>& hyper,
                         bool maximize, const OptionalTensor& lr_tensor, const OptionalTensor& inv_scale,
                         const OptionalTensor& clip_coef, const OptionalTensor& found_inf, bool stochastic_rounding);

// A step op's arguments, all of them checked: nothing can be refused any more.
struct CheckedStep {
  RuleId rule;
  StepScalars scalars;
  std::vector<StepRow> rows;
};
CheckedStep checked_step(const std::string& op, const StepLists& lists, double lr, const std::vector<double>& hyper,
                         bool maximize, const OptionalTensor& lr_tensor, const OptionalTensor& inv_scale,
                         const OptionalTensor& clip_coef, const OptionalTensor& found_inf, bool stochastic_rounding);

// The ops _check_step and _find_shared_memory (schemas.h), the same on every device.
void check_step(Tensors params, Tensors grads, Tensors masters, Tensors states, Tensors steps, Tensors scales,
                std::string op, double lr, std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor,
                OptionalTensor inv_scale, OptionalTensor clip_coef, OptionalTensor found_inf,
                std::vector<int64_t> seeds, bool stochastic_rounding);
std::tuple<int64_t, int64_t> find_shared_memory(Tensors tensors, int64_t written);

}  // namespace fusedamp
