// The pass before the step of rules with norms of whole tensors: one launch measures sums of squares per chunk; one
// sums them per tensor in a fixed order, without atomics, and computes the step's coefficients.
#pragma once
#include "visit.cuh"

namespace fusedamp::cuda {

struct ChunkSquares {
  double sums[kMaxNorms];
};

// In double, so that no square of a float overflows or underflows.
template <class Rule, class V>
struct MeasureAction {
  static constexpr bool kStores = false, kTallies = false;
  const CoeffsOf<Rule, V>& k;
  V grad_scale;
  ChunkSquares found;
  __device__ __forceinline__ void operator()(V& weight, V g, V (&s)[kStateRoom<Rule>]) {
    V x[Rule::kNorms];
    Rule::measure(k, g * grad_scale, weight, s, x);
#pragma unroll
    for (int j = 0; j < Rule::kNorms; ++j) {
      const double measured = x[j];
      found.sums[j] = fma(measured, measured, found.sums[j]);
    }
  }
};

template <class Rule, Kind kKind, class V = ValueOf<kKind>>
__global__ void __launch_bounds__(kBlock) measure_kernel(const StepRows table, const StepScalars scalars,
                                                         const CoeffsOf<Rule, V>* coeffs, ChunkSquares* records) {
  if (overflowed(scalars.found_inf)) return;
  int64_t r = -1;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    r = find_row(table, chunk, r);
    const StepRow& row = table.rows[r].row;
    const CoeffsOf<Rule, V> k = coeffs[r];
    MeasureAction<Rule, V> act = {k, grad_scale_of(row, scalars), {}};
    visit<Rule, kKind>(row, table.grads[r], span_of(table.rows[r], chunk), act);
#pragma unroll
    for (int j = 0; j < Rule::kNorms; ++j) {
      const double sum = block_reduce(act.found.sums[j], Add());
      if (threadIdx.x == 0) records[chunk].sums[j] = sum;
    }
  }
}

// Sums up `records`, or takes what the rows have if `records` is null; the rest of the step follows, or `only_measures`
// stores the sums. Blocks take tensors.
template <class Rule, class V>
__global__ void __launch_bounds__(kBlock)
    conclude_kernel(const StepRows table, const __grid_constant__ GroupPacket packet, const StepScalars scalars,
                    const ChunkSquares* records, bool only_measures, CoeffsOf<Rule, V>* coeffs) {
  if (overflowed(scalars.found_inf)) return;
  for (int64_t r = blockIdx.x; r < table.row_count; r += gridDim.x) {
    const StepRow& row = table.rows[r].row;
    const StepGroup* group = packet.of(row);
    if (!group) continue;
    const int64_t end = r + 1 < table.row_count ? table.rows[r + 1].first_chunk : table.chunk_count;
    double squares[kMaxNorms] = {};
#pragma unroll
    for (int j = 0; j < Rule::kNorms; ++j) {
      double sum = 0.0;
      for (int64_t c = table.rows[r].first_chunk + threadIdx.x; records && c < end; c += blockDim.x)
        sum += records[c].sums[j];
      squares[j] = records ? block_reduce(sum, Add()) : row.squares[j];
    }
    if (threadIdx.x == 0 && only_measures) {
#pragma unroll
      for (int j = 0; j < Rule::kNorms; ++j) row.squares[j] = squares[j];
    } else if (threadIdx.x == 0) {
      coeffs[r] = coeffs_for<Rule, V>(row, *group, squares);
      advance<Rule>(row, hyper_of<Rule>(*group), layer_of<Rule>(row, squares));
    }
  }
}

// `coeffs`: in: coefficients without norms; out: those of the step, unless it `only_measures`.
template <class Rule, Kind kKind, class V = ValueOf<kKind>>
void measure(const Device& device, const std::vector<Placed<StepRow>>& rows, const StepRows& table,
             const StepGroups& groups, const StepScalars& scalars, bool only_measures, CoeffsOf<Rule, V>* coeffs) {
  ChunkSquares* records = nullptr;
  if (only_measures || !rows.front().row.squares) {
    records = static_cast<ChunkSquares*>(
        device.scratch(std::max<int64_t>(table.chunk_count, 1) * static_cast<int64_t>(sizeof(ChunkSquares))));
    launch_over(table.chunk_count, device, "measure", &measure_kernel<Rule, kKind>, table, scalars,
                static_cast<const CoeffsOf<Rule, V>*>(coeffs), records);
  }
  for_each_packet(rows, groups, [&](const GroupPacket& packet) {
    launch_over(table.row_count, device, "conclude", &conclude_kernel<Rule, V>, table, packet, scalars,
                static_cast<const ChunkSquares*>(records), only_measures, coeffs);
  });
}

}  // namespace fusedamp::cuda
