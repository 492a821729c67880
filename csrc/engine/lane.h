// unscale -> step, for one element: the only per-element code. CPU, CUDA and float64 paths differ in load and store.
#pragma once
#include "../math/count.h"
#include "../math/rules.h"
#include "table.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// Array size for a rule's states; at least 1, because C++ has no empty arrays.
template <class Rule>
constexpr int kStateRoom = Rule::kStates > 0 ? Rule::kStates : 1;

// p is the master, or the weight if there is none; the caller rounds the copy.
template <class Rule, class V>
FUSEDAMP_FN void lane(const typename Rule::template Coeffs<V>& k, V grad_scale, V g, V& p, V (&s)[kStateRoom<Rule>]) {
  const V u = Rule::step(k, g * grad_scale, p, s);
  p = fma(-k.lr, u, p);
}

template <class Rule>
constexpr bool kPerTensor = Rule::kScalars + Rule::kNorms > 0;

template <class Rule>
FUSEDAMP_FN typename Rule::template Coeffs<double> coeffs_of(const typename Rule::Hyper& hyper, double lr,
                                                             const Layer& layer) {
  if constexpr (kPerTensor<Rule>) {
    return Rule::coeffs(hyper, lr, layer);
  } else {
    return Rule::coeffs(hyper, lr, layer.t);
  }
}

// A tensor's scalars and norms before its step. `squares` may be null: not measured yet.
template <class Rule>
FUSEDAMP_FN Layer layer_of(const StepRow& row, const double* squares) {
  Layer layer = {step_number(next_count(*row.step)), 0.0, {}};
  if constexpr (Rule::kScalars > 0) layer.scalar = *static_cast<const double*>(row.states[Rule::kStates]);
  for (int i = 0; squares && i < Rule::kNorms; ++i) layer.squares[i] = squares[i];
  return layer;
}

// Updates a tensor's step count and scalars. Call once, after computing its coefficients.
template <class Rule>
FUSEDAMP_FN void advance(const StepRow& row, const typename Rule::Hyper& hyper, const Layer& layer) {
  if constexpr (Rule::kScalars > 0) *static_cast<double*>(row.states[Rule::kStates]) = Rule::next_scalar(hyper, layer);
  *row.step = next_count(*row.step);
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
