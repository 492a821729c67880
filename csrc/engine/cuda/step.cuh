// The step over a list of tensors, for any update rule: one launch counts steps and derives the coefficients, one
// updates every float-computed tensor, whatever its types are; float64 tensors take a pair of their own.
#pragma once
#include "chunks.cuh"
#include "element.cuh"

#include "../lane.h"

namespace fusedamp::cuda {

template <class Rule, class V>
using CoeffsOf = typename Rule::template Coeffs<V>;

template <class Rule>
__device__ __forceinline__ typename Rule::Hyper hyper_of(const StepScalars& scalars) {
  typename Rule::Hyper hyper;
  memcpy(&hyper, scalars.hyper, sizeof hyper);
  return hyper;
}

// One thread per tensor.
template <class Rule, class V>
__global__ void __launch_bounds__(kBlock)
    prepare_kernel(const Table<StepRow> table, const StepScalars scalars, CoeffsOf<Rule, V>* coeffs) {
  if (overflowed(scalars.found_inf)) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= table.row_count) return;
  const double lr = scalars.lr_tensor ? value_at<double>(scalars.lr_tensor, scalars.lr_dtype, 0) : scalars.lr;
  float* step = table.rows[i].row.step;
  const CoeffsOf<Rule, double> exact = Rule::coeffs(hyper_of<Rule>(scalars), lr, static_cast<int64_t>(*step) + 1);
  coeffs[i] = round_coeffs<Rule::template Coeffs, V>(exact);
  *step += 1.0f;
}

// One chunk. G and P are the raw types of gradient and parameter; kMaster: the weight is a float master beside `param`.
template <class Rule, class V, class G, class P, bool kMaster>
__device__ __forceinline__ void step_chunk(const StepRow& row, Span span, const CoeffsOf<Rule, V>& k, V grad_scale) {
  constexpr bool kWide = kMaster || Rule::kStates > 0;  // is there a list of V?
  constexpr int kWidest = kWide ? sizeof(V) : sizeof(G) > sizeof(P) ? sizeof(G) : sizeof(P);
  constexpr int kVector = 16 / kWidest;  // the widest list moves 16 bytes at a time
  constexpr int kStates = kStateRoom<Rule>;

  const G* grads = in_global(static_cast<const G*>(row.grad) + span.first);
  P* params = in_global(static_cast<P*>(row.param) + span.first);
  V* masters = kMaster ? in_global(static_cast<V*>(row.master) + span.first) : nullptr;
  V* states[kStates];
  const int boundary = elements_to_boundary<kVector>(params);
  bool together = elements_to_boundary<kVector>(grads) == boundary;
  if (kMaster) together &= elements_to_boundary<kVector>(masters) == boundary;
#pragma unroll
  for (int j = 0; j < Rule::kStates; ++j) {
    states[j] = in_global(static_cast<V*>(row.states[j]) + span.first);
    together &= elements_to_boundary<kVector>(states[j]) == boundary;
  }
  const DType grad_dtype = row.grad_dtype, param_dtype = row.param_dtype;

  for_each_element<kVector>(span.count, together ? boundary : span.count, [&](int i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<G, N> grad = load<N>(grads + i);
    Pack<P, N> param = load<N>(params + i);
    Pack<V, N> master, state[kStates];
    if constexpr (kMaster) master = load<N>(masters + i);
#pragma unroll
    for (int j = 0; j < Rule::kStates; ++j) state[j] = load<N>(states[j] + i);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      V weight, s[kStates];
      // A weight that is not its master rounded was written by somebody: the master follows it.
      if (kMaster && narrow<P>(master.v[e], param_dtype) == param.v[e]) {
        weight = master.v[e];
      } else {
        weight = widen<V>(param.v[e], param_dtype);
      }
#pragma unroll
      for (int j = 0; j < Rule::kStates; ++j) s[j] = state[j].v[e];
      lane<Rule, V>(k, grad_scale, widen<V>(grad.v[e], grad_dtype), weight, s);
#pragma unroll
      for (int j = 0; j < Rule::kStates; ++j) state[j].v[e] = s[j];
      if constexpr (kMaster) master.v[e] = weight;
      param.v[e] = narrow<P>(weight, param_dtype);
    }
    if constexpr (kMaster) store<N>(masters + i, master);
#pragma unroll
    for (int j = 0; j < Rule::kStates; ++j) store<N>(states[j] + i, state[j]);
    store<N>(params + i, param);
  });
}

template <class Rule, class V>
__device__ __forceinline__ void step_any_chunk(const StepRow& row, Span span, const CoeffsOf<Rule, V>& k,
                                               V grad_scale) {
  const int64_t grad_bytes = size_of(row.grad_dtype);
  if constexpr (sizeof(V) == 8) {
    if (grad_bytes == 8) return step_chunk<Rule, V, uint64_t, uint64_t, false>(row, span, k, grad_scale);
    if (grad_bytes == 4) return step_chunk<Rule, V, uint32_t, uint64_t, false>(row, span, k, grad_scale);
    return step_chunk<Rule, V, uint16_t, uint64_t, false>(row, span, k, grad_scale);
  } else if (row.param_dtype == DType::f32) {
    if (grad_bytes == 4) return step_chunk<Rule, V, uint32_t, uint32_t, false>(row, span, k, grad_scale);
    return step_chunk<Rule, V, uint16_t, uint32_t, false>(row, span, k, grad_scale);
  } else if (row.master) {
    if (grad_bytes == 4) return step_chunk<Rule, V, uint32_t, uint16_t, true>(row, span, k, grad_scale);
    return step_chunk<Rule, V, uint16_t, uint16_t, true>(row, span, k, grad_scale);
  } else {
    if (grad_bytes == 4) return step_chunk<Rule, V, uint32_t, uint16_t, false>(row, span, k, grad_scale);
    return step_chunk<Rule, V, uint16_t, uint16_t, false>(row, span, k, grad_scale);
  }
}

// Blocks per multiprocessor that registers must leave room for: as many as go without spilling.
template <class Rule, class V>
constexpr int kResidentBlocks = sizeof(V) == 8 || Rule::kStates > 2 ? 2 : 3;

template <class Rule, class V>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<Rule, V>)
    step_kernel(const Table<StepRow> table, const StepScalars scalars, const CoeffsOf<Rule, V>* coeffs) {
  if (overflowed(scalars.found_inf)) return;
  float grad_scale = (scalars.inv_scale ? *scalars.inv_scale : 1.0f) * (scalars.clip_coef ? *scalars.clip_coef : 1.0f);
  if (scalars.maximize) grad_scale = -grad_scale;
  int64_t r = -1;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    r = find_row(table, chunk, r);
    const CoeffsOf<Rule, V> k = coeffs[r];
    step_any_chunk<Rule, V>(table.rows[r].row, span_of(table.rows[r], chunk), k, static_cast<V>(grad_scale));
  }
}

template <class Rule, class V>
void step_as(const Device& device, const std::vector<StepRow>& rows, const StepScalars& scalars) {
  if (rows.empty()) return;
  const Table<StepRow> table = place(device, rows);
  using Coeffs = CoeffsOf<Rule, V>;
  Coeffs* coeffs = static_cast<Coeffs*>(device.scratch(table.row_count * static_cast<int64_t>(sizeof(Coeffs))));
  const int64_t blocks = (table.row_count + kBlock - 1) / kBlock;
  launch("prepare", &prepare_kernel<Rule, V>, blocks, kBlock, device.stream, table, scalars, coeffs);
  if (table.chunk_count == 0) return;  // every tensor is empty: a step was taken all the same
  launch("step", &step_kernel<Rule, V>, grid_for(device, table.chunk_count), kBlock, device.stream, table, scalars,
         static_cast<const Coeffs*>(coeffs));
}

template <class Rule>
void step_with(const Device& device, const std::vector<StepRow>& rows, const StepScalars& scalars) {
  std::vector<StepRow> singles, doubles;
  for (const StepRow& row : rows) (row.param_dtype == DType::f64 ? doubles : singles).push_back(row);
  step_as<Rule, float>(device, singles, scalars);
  step_as<Rule, double>(device, doubles, scalars);
}

}  // namespace fusedamp::cuda

#define FUSEDAMP_CUDA_STEP(Rule)                                                                      \
  template void fusedamp::cuda::step_with<fusedamp::Rule>(const Device&, const std::vector<StepRow>&, \
                                                          const StepScalars&);
