#include "packed.h"

#include "../math/random.h"

namespace fusedamp {
namespace {

const char* const kPlan = "_planned_step_";

// The number of rows in a table.
int64_t row_count(const std::string& op, const char* name, const Tensor& table, int64_t columns) {
  if (table.scalar_type() != ScalarType::Long || !table.is_cpu() || !table.is_contiguous() ||
      table.numel() % columns != 0)
    fail(op, name, " are ", dtype_name(table), " of shape ", list_text(table.sizes()), " on ", device_name(table),
         "; expected contiguous int64 [n, ", columns, "] on the cpu");
  return table.numel() / columns;
}

// How many tensors, and how many scalars beside them, a parameter's states are.
int state_tensors(RuleId rule) {
  static constexpr int kCounts[] = {
#define FUSEDAMP_RULE(op, Rule) Rule::kStates,
#include "../math/optimizers.def"
  };
  return kCounts[rule];
}
int state_scalars(RuleId rule) {
  static constexpr int kCounts[] = {
#define FUSEDAMP_RULE(op, Rule) Rule::kScalars,
#include "../math/optimizers.def"
  };
  return kCounts[rule];
}

// Throws unless a row's dtypes can be what they are for.
void need_kinds(const std::string& op, int64_t i, const StepRow& row, int states) {
  const auto is_float = [](DType t) { return t <= DType::f64; };
  const bool wide = row.param_dtype == DType::f64;
  const char* wrong = nullptr;
  if (!is_float(row.param_dtype))
    wrong = "a param";
  else if (!is_float(row.grad_dtype) || (row.grad_dtype == DType::f64 && !wide))
    wrong = "its gradient";
  else if (row.master &&
           (!is_16bit(row.param_dtype) || (row.master_dtype != DType::f32 && row.master_dtype != DType::i16)))
    wrong = "its master";
  else if (states > 0 &&
           (wide ? row.state_dtype != DType::f64
                 : row.state_dtype != DType::f32 && row.state_dtype != DType::bf16 && row.state_dtype != DType::i8))
    wrong = "its states";
  if (wrong)
    fail(op, Name{"rows", i}, " has dtype codes ", int(row.param_dtype), ", ", int(row.grad_dtype), ", ",
         int(row.master_dtype), ", ", int(row.state_dtype),
         " of param, gradient, master and states; expected those that the op takes, also for ", wrong);
}

// Throws unless the row has all addresses that it needs; an empty tensor has none.
void need_addresses(const std::string& op, int64_t i, const StepRow& row, int tensors, int lists) {
  const auto there = [](const void* s) { return s != nullptr; };
  const bool scalars = row.step && std::all_of(row.states + tensors, row.states + lists, there);
  const bool elements = row.param && std::all_of(row.states, row.states + tensors, there);
  const bool scales = row.state_dtype != DType::i8 || std::all_of(row.scales, row.scales + tensors, there);
  if (row.numel < 0 || !scalars || (row.numel > 0 && !(elements && scales)))
    fail(op, Name{"rows", i}, " has ", row.numel, " elements or lacks an address; expected 0 or more, a step count, ",
         "and addresses of param, gradient and the states and scales of the op");
}

void need_row(const std::string& op, int64_t i, const StepRow& row, RuleId rule) {
  const int tensors = state_tensors(rule), lists = tensors + state_scalars(rule);
  need_kinds(op, i, row, tensors);
  need_addresses(op, i, row, tensors, lists);
}

// Throws unless every row that has elements has a gradient.
void need_grads(const std::string& op, const StepTable& table) {
  for (int64_t i = 0; i < table.count; ++i)
    if (!table.grads[i] && table.rows[i].numel > 0)
      fail(op, Name{"rows", i}, " has ", table.rows[i].numel, " elements or lacks an address; expected that of its ",
           "gradient");
}

void* const* grads_of(const std::string& op, const Tensor& grads, int64_t n) {
  if (row_count(op, "grads", grads, 1) != n)
    fail(op, "grads has ", grads.numel(), " addresses; expected ", n, ", one per row");
  return static_cast<void* const*>(grads.data_ptr());
}

// Throws unless the groups are those of `n` rows, one after the other, of rules that there are.
StepGroups groups_of(const std::string& op, const Tensor& groups, int64_t n) {
  const int64_t count = row_count(op, "groups", groups, sizeof(StepGroup) / sizeof(int64_t));
  const auto* group = static_cast<const StepGroup*>(groups.data_ptr());
  int64_t end = 0;
  for (int64_t g = 0; g < count; ++g) {
    const auto name = Name{"groups", g};
    if (group[g].rule < 0 || group[g].rule >= kRuleCount)
      fail(op, name, " has rule ", group[g].rule, "; expected a number that _rule_of gives");
    if (group[g].first != end || group[g].count < 0 || group[g].count > n - end)
      fail(op, name, " has ", group[g].count, " rows from ", group[g].first, "; expected 0 or more from ", end, " of ",
           n, " rows");
    if (group[g].lr_tensor && group[g].lr_dtype != DType::f32 && group[g].lr_dtype != DType::f64)
      fail(op, name, " has an lr of dtype code ", int(group[g].lr_dtype), "; expected float32 or float64");
    end += group[g].count;
  }
  if (end != n) fail(op, "groups have ", end, " rows; expected all ", n);
  return {group, count};
}

const StepRow* rows_of(const std::string& op, const Tensor& rows, int64_t* count) {
  *count = row_count(op, "rows", rows, sizeof(StepRow) / sizeof(int64_t));
  return static_cast<const StepRow*>(rows.data_ptr());
}

// What is in memory where a bool should be.
uint8_t byte_of(const bool& flag) { return *reinterpret_cast<const uint8_t*>(&flag); }

}  // namespace

PlannedStep planned_step(const Tensor& rows, const Tensor& grads, const Tensor& groups) {
  PlannedStep plan = {kPlan, {}, {}};
  plan.table.rows = rows_of(kPlan, rows, &plan.table.count);
  plan.table.grads = grads_of(kPlan, grads, plan.table.count);
  plan.groups = groups_of(kPlan, groups, plan.table.count);
  if (plan.groups.count > 0) plan.op = op_of(plan.groups.groups[0].rule);
  need_grads(plan.op, plan.table);
  return plan;
}

StepLog step_log(const std::string& op, const Tensor& like, const OptionalTensor& counts,
                 const OptionalTensor& log_counts, const OptionalTensor& log_step, const OptionalTensor& log_steps) {
  const auto number = [&](const char* name, const OptionalTensor& scalar) {
    return one_element<int64_t>(op, {name}, scalar, like, ScalarType::Long, "int64");
  };
  const auto list = [&](const char* name, const OptionalTensor& t) {
    if (!t) return static_cast<int64_t*>(nullptr);
    need_device(op, {name}, *t, {"the tensors of the call"}, like);
    if (t->scalar_type() != ScalarType::Long || !t->is_contiguous())
      fail(op, name, " is ", dtype_name(*t), " of shape ", list_text(t->sizes()), "; expected contiguous int64");
    return static_cast<int64_t*>(t->data_ptr());
  };
  StepLog log = {number("log_steps", log_steps), list("counts", counts), list("log_counts", log_counts),
                 number("log_step", log_step), 0};
  if (!log_steps && (log_step || log_counts)) fail(op, "log_steps is missing; expected it beside what it counts");
  if (!log_counts) return log;
  log.words = log_counts->numel();
  if (!counts || counts->numel() != log.words)
    fail(op, "counts has ", counts ? counts->numel() : 0, " elements; expected ", log.words, ", as many as log_counts");
  return log;
}

void check_plan(Tensor rows, Tensor groups, Tensor /*like*/) {
  int64_t n = 0;
  const StepRow* row = rows_of("_check_plan", rows, &n);
  const StepGroups all = groups_of("_check_plan", groups, n);
  for (int64_t g = 0; g < all.count; ++g) {
    const StepGroup& group = all.groups[g];
    const std::string op = op_of(group.rule);
    for (int64_t i = group.first; i < group.first + group.count; ++i) {
      const Name name = {"rows", i};
      if (row[i].group != g) fail(op, name, " is of group ", row[i].group, "; expected ", g);
      const int maximize = byte_of(row[i].maximize), stochastic = byte_of(row[i].stochastic);
      if (maximize > 1 || stochastic > 1)
        fail(op, name, " has flags ", maximize, " and ", stochastic, "; expected 0 or 1");
      if (!is_whole(row[i].place) || row[i].squares)
        fail(op, name, " is of a shard; expected whole tensors. Step shards by the op itself");
      need_row(op, i, row[i], static_cast<RuleId>(group.rule));
    }
  }
}

std::vector<GradRow> packed_grad_rows(const std::string& op, const Tensor& rows) {
  const int64_t n = row_count(op, "rows", rows, 3);
  std::vector<GradRow> unpacked(n);
  const auto* from = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    void* grad = reinterpret_cast<void* const*>(from)[i];
    const int64_t numel = from[n + i], code = from[2 * n + i];
    if (code < 0 || code > static_cast<int64_t>(DType::f64))
      fail(op, Name{"rows", i}, " has dtype code ", code, "; expected that of a floating-point type, 0 to 3");
    if (numel < 0 || (!grad && numel > 0))
      fail(op, Name{"rows", i}, " has ", numel, " elements at ", grad, "; expected 0 or more, with an address");
    unpacked[i] = {grad, numel, static_cast<DType>(code)};
  }
  return unpacked;
}

}  // namespace fusedamp
