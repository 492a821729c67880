// The step over a list of tensors, for any update rule: one launch updates step counts and computes the coefficients,
// one updates all tensors with float arithmetic, for all combinations of types. Compressed and float64 tensors use
// separate pairs of launches.
#pragma once
#include "measure.cuh"
#include "tally.cuh"

namespace fusedamp::cuda {

// Minimum blocks per multiprocessor for register allocation: as many as possible without spilling.
template <class Rule, Kind kKind>
constexpr int resident_blocks_of() {
  if (kKind == Kind::kDouble || kKind == Kind::kCut) return 2;
  const bool compressed = kKind == Kind::kCompressed;
  const bool many = Rule::kStates > 2 || (compressed && Rule::kStates > 1 && Rule::kScalars > 0);  // AMSGrad; NAdam
  return (compressed ? 4 : 3) - many;
}
template <class Rule, Kind kKind>
constexpr int kResidentBlocks = resident_blocks_of<Rule, kKind>();

template <class Rule, Kind kKind, class V = ValueOf<kKind>>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<Rule, kKind>)
    step_kernel(const StepRows table, const StepScalars scalars, const CoeffsOf<Rule, V>* coeffs, const int32_t* due) {
  if (overflowed(scalars.found_inf) || (due && *due != 0)) return;  // the tally kernel steps if it is due
  int64_t r = -1;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    r = find_row(table, chunk, r);
    const StepRow& row = table.rows[r].row;
    const CoeffsOf<Rule, V> k = coeffs[r];
    StepAction<Rule, V> act = {k, grad_scale_of(row, scalars)};
    visit<Rule, kKind>(row, table.grads[r], span_of(table.rows[r], chunk), act);
  }
}

// The rows of one pass, on the host.
struct StepList : Gathered<StepRow> {
  std::vector<void*> grads;
  std::vector<int64_t> places;  // in the table of the call

  void add(const StepRow& row, void* grad, int64_t place) {
    Gathered<StepRow>::add(row);
    grads.push_back(grad);
    places.push_back(place);
  }
  StepRows on(const Device& device) const {
    const Table<StepRow> table = Gathered<StepRow>::on(device);
    const void* resident = device.resident(grads.data(), static_cast<int64_t>(grads.size() * sizeof grads[0]));
    return {table, static_cast<void* const*>(resident)};
  }
};

template <class Rule, Kind kKind>
void step_as(const Device& device, const StepList& list, const StepGroups& groups, const StepScalars& scalars,
             StepLog& log, const Tally& tally, bool only_measures) {
  if (list.rows.empty()) return;
  const StepRows table = list.on(device);
  using V = ValueOf<kKind>;
  using Coeffs = CoeffsOf<Rule, V>;
  Coeffs* coeffs = static_cast<Coeffs*>(device.scratch(table.row_count * static_cast<int64_t>(sizeof(Coeffs))));
  const int64_t blocks = (table.row_count + kBlock - 1) / kBlock;
  for_each_packet(list.rows, groups, [&](const GroupPacket& packet) {
    launch("prepare", &prepare_kernel<Rule, V>, blocks, kBlock, device.stream, table, packet, scalars, log, coeffs);
    log = {};  // it is updated already
  });
  if constexpr (Rule::kNorms > 0)
    measure<Rule, kKind>(device, list.rows, table, groups, scalars, only_measures, coeffs);
  if (only_measures) return;
  const bool always_due = tally.updates && !tally.due;
  if (table.chunk_count > 0 && !always_due)  // where all tensors are empty, the step counts
    launch_over(table.chunk_count, device, "step", &step_kernel<Rule, kKind>, table, scalars,
                static_cast<const Coeffs*>(coeffs), tally.updates ? tally.due : nullptr);
  if (tally.updates) tallied_step<Rule, V>(device, list.places, table, scalars, tally, coeffs);
}

// `table`: the rows of this rule; `groups`: all of the step; `tally`: of these rows. `only_measures`: instead of a
// step, the rows' squares.
template <class Rule>
void step_with(const Device& device, const StepTable& table, const StepGroups& groups, const StepScalars& scalars,
               StepLog& log, const Tally& tally, bool only_measures) {
  if (only_measures && Rule::kNorms == 0) return;
  StepList singles, compressed, doubles, cut;
  for (int64_t i = 0; i < table.count; ++i) {
    const StepRow& row = table.rows[i];
    StepList& narrow = !is_compressed(row) ? singles : draws_in_quads(row) ? compressed : cut;
    (row.param_dtype == DType::f64 ? doubles : narrow).add(row, table.grads[i], i);
  }
  step_as<Rule, Kind::kSingle>(device, singles, groups, scalars, log, tally, only_measures);
  step_as<Rule, Kind::kCompressed>(device, compressed, groups, scalars, log, tally, only_measures);
  step_as<Rule, Kind::kDouble>(device, doubles, groups, scalars, log, tally, only_measures);
  step_as<Rule, Kind::kCut>(device, cut, groups, scalars, log, tally, only_measures);
}

}  // namespace fusedamp::cuda

#define FUSEDAMP_CUDA_STEP(Rule)                                                                              \
  template void fusedamp::cuda::step_with<fusedamp::Rule>(const Device&, const StepTable&, const StepGroups&, \
                                                          const StepScalars&, StepLog&, const Tally&, bool);
