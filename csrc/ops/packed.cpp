// Rows that Python packed: from addresses to the engines' rows, with the checks that addresses allow.
#include "rows.h"

namespace fusedamp {
namespace {

int64_t packed_count(const std::string& op, const Tensor& packed, int64_t columns) {
  if (packed.scalar_type() != ScalarType::Long || !packed.is_cpu() || !packed.is_contiguous() ||
      packed.numel() % columns != 0)
    fail(op, "rows are ", dtype_name(packed), " of shape ", list_text(packed.sizes()), " on ", device_name(packed),
         "; expected contiguous int64 [n, ", columns, "] on the cpu");
  return packed.numel() / columns;
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

// Throws unless the dtypes of a packed row, in the bytes of `kinds`, can be what they are for.
void need_kinds(const std::string& op, int64_t i, const StepRow& row, int64_t kinds, int states) {
  const auto is_float = [](DType t) { return t <= DType::f64; };
  const bool wide = row.param_dtype == DType::f64;
  const char* wrong = nullptr;
  if (kinds >> 32 || !is_float(row.param_dtype))
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
    fail(op, at("rows", i), " has dtype codes ", kinds & 255, ", ", kinds >> 8 & 255, ", ", kinds >> 16 & 255, ", ",
         kinds >> 24, " of param, gradient, master and states; expected those that the op takes, also for ", wrong);
}

bool has_scales(const StepRow& row, int tensors) {
  return row.numel == 0 || std::all_of(row.scales, row.scales + tensors, [](const float* s) { return s != nullptr; });
}

// Throws unless the row has all addresses that it needs; an empty tensor has none.
void need_addresses(const std::string& op, int64_t i, const StepRow& row, int tensors, int lists) {
  const auto there = [](const void* s) { return s != nullptr; };
  const bool scalars = row.step && std::all_of(row.states + tensors, row.states + lists, there);
  const bool elements = row.grad && row.param && std::all_of(row.states, row.states + tensors, there);
  const bool scales = row.state_dtype != DType::i8 || has_scales(row, tensors);
  if (row.numel < 0 || !scalars || (row.numel > 0 && !(elements && scales)))
    fail(op, at("rows", i), " has ", row.numel, " elements or lacks an address; expected 0 or more, a step count, and ",
         "addresses of param, gradient and the states and scales of the op");
}

}  // namespace

std::vector<StepRow> packed_step_rows(const std::string& op, RuleId rule, const Tensor& rows, const Tensor& grads) {
  constexpr int64_t kColumns = 12;
  const int64_t n = packed_count(op, rows, kColumns);
  if (packed_count(op, grads, 1) != n)
    fail(op, "grads has ", grads.numel(), " addresses; expected ", n, ", one per row");
  const auto* from = static_cast<const int64_t*>(rows.data_ptr());
  const auto* grad = static_cast<void* const*>(grads.data_ptr());
  const int tensors = state_tensors(rule), lists = tensors + state_scalars(rule);
  std::vector<StepRow> unpacked;
  unpacked.reserve(n);        // not filled with zeros first
  int64_t good_kinds = -1;    // rows of the same dtypes follow each other
  bool good_masters = false;  // whose dtype counts only where there is one
  for (int64_t i = 0; i < n; ++i, from += kColumns) {
    void* const* address = reinterpret_cast<void* const*>(from);
    const auto scales = [&](int j) { return static_cast<float*>(address[j]); };
    const auto dtype = [&](int byte) { return static_cast<DType>(from[11] >> 8 * byte & 255); };
    const bool scaled = tensors > 0 && is_8bit(dtype(3));
    unpacked.push_back({grad[i],
                        address[0],
                        address[1],
                        {address[2], address[3], address[4]},
                        {scales(5), scales(6), scales(7)},
                        static_cast<float*>(address[8]),
                        from[9],
                        from[10],
                        dtype(1),
                        dtype(0),
                        dtype(2),
                        is_8bit(dtype(3)) ? DType::i8 : dtype(3)});
    const StepRow& row = unpacked.back();
    if (from[11] != good_kinds || (row.master && !good_masters)) {
      need_kinds(op, i, row, from[11], tensors);
      good_kinds = from[11];
      good_masters = row.master != nullptr;
    }
    // Almost always all is there, and one test says so.
    const bool whole = row.grad && row.param && row.step && (lists < 1 || row.states[0]) &&
                       (lists < 2 || row.states[1]) && (lists < 3 || row.states[2]) && row.numel >= 0;
    if (!whole || (scaled && !has_scales(row, tensors))) need_addresses(op, i, row, tensors, lists);
  }
  return unpacked;
}

std::vector<GradRow> packed_grad_rows(const Tensor& rows) {
  const char* op = "grad_stats";
  const int64_t n = packed_count(op, rows, 3);
  std::vector<GradRow> unpacked(n);
  const auto* from = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    void* grad = reinterpret_cast<void* const*>(from)[i];
    const int64_t numel = from[n + i], code = from[2 * n + i];
    if (code < 0 || code > static_cast<int64_t>(DType::f64))
      fail(op, at("rows", i), " has dtype code ", code, "; expected that of a floating-point type, 0 to 3");
    if (numel < 0 || (!grad && numel > 0))
      fail(op, at("rows", i), " has ", numel, " elements at ", grad, "; expected 0 or more, with an address");
    unpacked[i] = {grad, numel, static_cast<DType>(code)};
  }
  return unpacked;
}

}  // namespace fusedamp
