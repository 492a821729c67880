// Visits every element of a chunk with weight, gradient and states in their stored types.
#pragma once
#include "compressed.cuh"

namespace fusedamp::cuda {

// act(weight, gradient, states) for each element of one chunk; the results are stored where Action::kStores.
// G and P are the raw types of gradient and parameter; kMaster: the weight is a float master beside `param`.
template <class Rule, class V, class G, class P, bool kMaster, class Action>
__device__ __forceinline__ void visit_chunk(const StepRow& row, const void* grad, Span span, Action& act) {
  constexpr bool kWide = kMaster || Rule::kStates > 0;  // whether there is a list of V
  constexpr int kWidest = kWide ? sizeof(V) : sizeof(G) > sizeof(P) ? sizeof(G) : sizeof(P);
  constexpr int kVector = 16 / kWidest;  // the widest list moves 16 bytes at a time
  constexpr int kStates = kStateRoom<Rule>;

  const G* grads = in_global(static_cast<const G*>(grad) + span.first);
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
      if constexpr (kMaster) {
        // A weight that differs from its rounded master was modified: the master is updated.
        const P rounded = narrow<P>(master.v[e], param_dtype);
        weight = rounded == param.v[e] ? master.v[e] : followed(master.v[e], rounded, param.v[e], param_dtype);
      } else {
        weight = widen<V>(param.v[e], param_dtype);
      }
#pragma unroll
      for (int j = 0; j < Rule::kStates; ++j) s[j] = state[j].v[e];
      act(weight, widen<V>(grad.v[e], grad_dtype), s);
#pragma unroll
      for (int j = 0; j < Rule::kStates; ++j) state[j].v[e] = s[j];
      if constexpr (kMaster) master.v[e] = weight;
      param.v[e] = narrow<P>(weight, param_dtype);
    }
    if constexpr (!Action::kStores) return;
    if constexpr (kMaster) store<N>(masters + i, master);
#pragma unroll
    for (int j = 0; j < Rule::kStates; ++j) store<N>(states[j] + i, state[j]);
    store<N>(params + i, param);
  });
}

template <class Rule, class V, class Action>
__device__ __forceinline__ void visit_any_chunk(const StepRow& row, const void* grad, Span span, Action& act) {
  const int64_t grad_bytes = size_of(row.grad_dtype);
  if constexpr (sizeof(V) == 8) {
    if (grad_bytes == 8) return visit_chunk<Rule, V, uint64_t, uint64_t, false>(row, grad, span, act);
    if (grad_bytes == 4) return visit_chunk<Rule, V, uint32_t, uint64_t, false>(row, grad, span, act);
    return visit_chunk<Rule, V, uint16_t, uint64_t, false>(row, grad, span, act);
  } else if (row.param_dtype == DType::f32) {
    if (grad_bytes == 4) return visit_chunk<Rule, V, uint32_t, uint32_t, false>(row, grad, span, act);
    return visit_chunk<Rule, V, uint16_t, uint32_t, false>(row, grad, span, act);
  } else if (row.master) {
    if (grad_bytes == 4) return visit_chunk<Rule, V, uint32_t, uint16_t, true>(row, grad, span, act);
    return visit_chunk<Rule, V, uint16_t, uint16_t, true>(row, grad, span, act);
  } else {
    if (grad_bytes == 4) return visit_chunk<Rule, V, uint32_t, uint16_t, false>(row, grad, span, act);
    return visit_chunk<Rule, V, uint16_t, uint16_t, false>(row, grad, span, act);
  }
}

// Which of a call's tensors a launch processes: float arithmetic with uncompressed storage, float arithmetic with
// compressed storage, float64, or compressed shards whose random numbers are not in pairs.
enum class Kind { kSingle, kCompressed, kDouble, kCut };
template <Kind kKind>
using ValueOf = std::conditional_t<kKind == Kind::kDouble, double, float>;

template <class Rule, Kind kKind, class Action>
__device__ __forceinline__ void visit(const StepRow& row, void* const& grad, Span span, Action& act) {
  if constexpr (kKind == Kind::kCompressed || kKind == Kind::kCut) {
    using D = std::conditional_t<kKind == Kind::kCut, CutDraws, Draws>;
    const int64_t t = step_number(*row.step);  // of this step; the count is updated before the step
    visit_compressed_chunk<D, Rule>(row, grad, span, act, random_stream(row.seed, t));
  } else {
    visit_any_chunk<Rule, ValueOf<kKind>>(row, grad, span, act);
  }
}

}  // namespace fusedamp::cuda
