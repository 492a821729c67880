// Steps that are tallied (table.h, Tally): beside each step kernel, a kernel that steps in its place if the tally is
// due. It writes a record per chunk; another one sums them per tensor in a fixed order, without atomics. All tensors
// with float arithmetic share one loop, which is slower for some formats, but few steps are due.
#pragma once
#include "../tally.h"
#include "visit.cuh"

namespace fusedamp::cuda {

struct ChunkTally {
  double sums[kTallies];  // as in Tally
};

// The update of an element: act(weight, gradient, states). kStores: whether to store the results.
template <class Rule, class V>
struct StepAction {
  static constexpr bool kStores = true, kTallies = false;
  const CoeffsOf<Rule, V>& k;
  V grad_scale;
  __device__ __forceinline__ void operator()(V& weight, V g, V (&s)[kStateRoom<Rule>]) const {
    lane<Rule, V>(k, grad_scale, g, weight, s);
  }
};

// The same, and a tally of one thread's elements.
template <class Rule, class V>
struct TallyAction {
  static constexpr bool kStores = true, kTallies = true;
  StepAction<Rule, V> step;
  uint32_t moved, lost;
  double update, weight;

  __device__ __forceinline__ void operator()(V& value, V g, V (&s)[kStateRoom<Rule>]) {
    const V old = value;
    step(value, g, s);
    if constexpr (sizeof(V) == sizeof(double)) tally_element<DType::f32>(old, value, 0.0f, update, weight, moved, lost);
  }
  // Of a lane's elements with float arithmetic; `params`: the weights that the step found.
  __device__ __forceinline__ void tally(const StepRow& row, const Words& params, const Numbers& old, const Numbers& now,
                                        int count) {
    if (row.param_dtype == DType::f16) return tally_as<DType::f16>(row, params, old, now, count);
    if (row.param_dtype == DType::bf16) return tally_as<DType::bf16>(row, params, old, now, count);
    tally_as<DType::f32>(row, params, old, now, count);
  }

 private:
  template <DType kHalf>
  __device__ __forceinline__ void tally_as(const StepRow& row, const Words& params, const Numbers& old,
                                           const Numbers& now, int count) {
    const Numbers found = widened<kHalf>(params);
    const bool splits = kHalf == DType::f16 && row.master && row.master_dtype == DType::i16;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      float value = now.v[e];
      if (splits) {  // what the remainder can hold
        const float half = widen<float>(narrow<uint16_t>(value, DType::f16), DType::f16);
        value = f16_joined(half, f16_remainder(value, half));
      }
      if (e < count) tally_element<kHalf>(old.v[e], value, found.v[e], update, weight, moved, lost);
    }
  }
};

template <class Rule, class V>
__global__ void __launch_bounds__(kBlock, 2)
    tally_kernel(const StepRows table, const StepScalars scalars, const CoeffsOf<Rule, V>* coeffs, const int32_t* due,
                 ChunkTally* records) {
  if (overflowed(scalars.found_inf) || (due && *due == 0)) return;
  constexpr Kind kKind = sizeof(V) == sizeof(double) ? Kind::kDouble : Kind::kCut;  // that takes all formats
  int64_t r = -1;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    r = find_row(table, chunk, r);
    const StepRow& row = table.rows[r].row;
    const CoeffsOf<Rule, V> k = coeffs[r];
    TallyAction<Rule, V> act = {{k, grad_scale_of(row, scalars)}, 0, 0, 0.0, 0.0};
    visit<Rule, kKind>(row, table.grads[r], span_of(table.rows[r], chunk), act);
    const double found[kTallies] = {double(act.moved), double(act.lost), act.update, act.weight};
#pragma unroll
    for (int j = 0; j < kTallies; ++j) {
      const double sum = block_reduce(found[j], Add());
      if (threadIdx.x == 0) records[chunk].sums[j] = sum;
    }
  }
}

// Sums up `records` per tensor and writes them where the step was tallied. places[i]: of row i in tally.updates.
void sum_up_tallies(const Device& device, const StepRows& table, const std::vector<int64_t>& places,
                    const StepScalars& scalars, const Tally& tally, const ChunkTally* records);

template <class Rule, class V>
void tallied_step(const Device& device, const std::vector<int64_t>& places, const StepRows& table,
                  const StepScalars& scalars, const Tally& tally, const CoeffsOf<Rule, V>* coeffs) {
  auto* records = static_cast<ChunkTally*>(
      device.scratch(std::max<int64_t>(table.chunk_count, 1) * static_cast<int64_t>(sizeof(ChunkTally))));
  if (table.chunk_count > 0)
    launch_over(table.chunk_count, device, "tally", &tally_kernel<Rule, V>, table, scalars, coeffs, tally.due, records);
  sum_up_tallies(device, table, places, scalars, tally, records);
}

}  // namespace fusedamp::cuda
