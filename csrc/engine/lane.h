// unscale -> step, for one element: the only per-element code. CPU, CUDA and float64 paths differ in load and store.
#pragma once
#include "../math/rules.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// Room for a rule's states; never an empty array, which C++ does not have.
template <class Rule>
constexpr int kStateRoom = Rule::kStates > 0 ? Rule::kStates : 1;

// p is the master (or the weight itself where there is none); the caller rounds the copy.
template <class Rule, class V>
FUSEDAMP_FN void lane(const typename Rule::template Coeffs<V>& k, V grad_scale, V g, V& p, V (&s)[kStateRoom<Rule>]) {
  const V u = Rule::step(k, g * grad_scale, p, s);
  p = fma(-k.lr, u, p);
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
