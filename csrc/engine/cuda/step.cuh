// The step over a list of tensors, for any update rule: one launch counts steps and derives the coefficients, one
// updates every float-computed tensor, whatever its types are; compressed tensors and float64 tensors take pairs of
// their own.
#pragma once
#include "measure.cuh"

namespace fusedamp::cuda {

// What happens to an element: act(weight, gradient, states). kStores: whether the results are to be kept.
template <class Rule, class V>
struct StepAction {
  static constexpr bool kStores = true;
  const CoeffsOf<Rule, V>& k;
  V grad_scale;
  __device__ __forceinline__ void operator()(V& weight, V g, V (&s)[kStateRoom<Rule>]) const {
    lane<Rule, V>(k, grad_scale, g, weight, s);
  }
};

// Blocks per multiprocessor that registers must leave room for: as many as go without spilling.
template <class Rule, Kind kKind>
constexpr int kResidentBlocks = kKind == Kind::kDouble ? 2 : (kKind == Kind::kCompressed ? 4 : 3) - (Rule::kStates > 2);

template <class Rule, Kind kKind, class V = ValueOf<kKind>>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<Rule, kKind>)
    step_kernel(const Table<StepRow> table, const StepScalars scalars, const CoeffsOf<Rule, V>* coeffs) {
  if (overflowed(scalars.found_inf)) return;
  const V grad_scale = grad_scale_of(scalars);
  int64_t r = -1;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    r = find_row(table, chunk, r);
    const CoeffsOf<Rule, V> k = coeffs[r];
    StepAction<Rule, V> act = {k, grad_scale};
    visit<Rule, kKind>(table.rows[r].row, span_of(table.rows[r], chunk), scalars, act);
  }
}

template <class Rule, Kind kKind>
void step_as(const Device& device, const std::vector<StepRow>& rows, const StepScalars& scalars) {
  if (rows.empty()) return;
  const Table<StepRow> table = place(device, rows);
  using V = ValueOf<kKind>;
  using Coeffs = CoeffsOf<Rule, V>;
  Coeffs* coeffs = static_cast<Coeffs*>(device.scratch(table.row_count * static_cast<int64_t>(sizeof(Coeffs))));
  const int64_t blocks = (table.row_count + kBlock - 1) / kBlock;
  launch("prepare", &prepare_kernel<Rule, V>, blocks, kBlock, device.stream, table, scalars, coeffs);
  if constexpr (Rule::kNorms > 0) measure<Rule, kKind>(device, table, scalars, coeffs);
  if (table.chunk_count == 0) return;  // every tensor is empty: a step was taken all the same
  launch_over(table.chunk_count, device, "step", &step_kernel<Rule, kKind>, table, scalars,
              static_cast<const Coeffs*>(coeffs));
}

template <class Rule>
void step_with(const Device& device, const std::vector<StepRow>& rows, const StepScalars& scalars) {
  std::vector<StepRow> singles, compressed, doubles;
  for (const StepRow& row : rows)
    (row.param_dtype == DType::f64 ? doubles : is_compressed(row, scalars) ? compressed : singles).push_back(row);
  step_as<Rule, Kind::kSingle>(device, singles, scalars);
  step_as<Rule, Kind::kCompressed>(device, compressed, scalars);
  step_as<Rule, Kind::kDouble>(device, doubles, scalars);
}

}  // namespace fusedamp::cuda

#define FUSEDAMP_CUDA_STEP(Rule)                                                                      \
  template void fusedamp::cuda::step_with<fusedamp::Rule>(const Device&, const std::vector<StepRow>&, \
                                                          const StepScalars&);
