// Every op's schema, spelled once. All optimizers share one shape.
#pragma once

namespace fusedamp {

// params, grads, masters (empty, or one per param), states (all first ones, then all second ones ...), steps.
#define FUSEDAMP_STEP_SCHEMA(op)                                                                                  \
  #op "_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] states, Tensor(d!)[] steps, *, " \
      "float lr, float[] hyper, bool maximize=False, Tensor? lr_tensor=None, Tensor? inv_scale=None, "            \
      "Tensor? clip_coef=None, Tensor? found_inf=None) -> ()"

constexpr const char* kUnscaleSchema = "unscale_(Tensor(a!)[] grads, Tensor inv_scale, Tensor(b!) found_inf) -> ()";

// -> found_inf fp32 [], total fp64 [], per_tensor fp64 [n], counts int64 [n, 3] (inf, NaN, overflowing when unscaled)
constexpr const char* kGradStatsSchema =
    "grad_stats(Tensor[] grads, Tensor? inv_scale=None, float norm_type=2.0) -> (Tensor, Tensor, Tensor, Tensor)";

constexpr const char* kUpdateScaleSchema =
    "update_scale_(Tensor(a!) scale, Tensor(b!) growth_tracker, Tensor(c!)? hysteresis_tracker, Tensor found_inf, *, "
    "float growth_factor, float backoff_factor, int growth_interval, float min_scale, float max_scale, "
    "int hysteresis, bool refill_on_good_step) -> ()";

}  // namespace fusedamp
