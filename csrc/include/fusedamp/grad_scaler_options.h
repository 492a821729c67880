// The options of a GradScaler.
#pragma once
#include <torch/arg.h>

#include <cmath>
#include <cstdint>
#include <string>

namespace fusedamp {

// The smallest normal FP32 number. Its reciprocal is finite; from 2**-128 on it would be inf.
constexpr double kMinScale = 0x1p-126;

// The options of a GradScaler, in torch's builder style:
// GradScalerOptions().init_scale(65536).growth_interval(2000). Those of the first five lines are torch's, in Python.
struct GradScalerOptions {
  TORCH_ARG(double, init_scale) = 65536.0;
  TORCH_ARG(double, growth_factor) = 2.0;
  TORCH_ARG(double, backoff_factor) = 0.5;
  TORCH_ARG(int64_t, growth_interval) = 2000;
  TORCH_ARG(bool, enabled) = true;
  // Bounds of the scale; the default lower one only keeps 1/scale finite.
  TORCH_ARG(double, min_scale) = kMinScale;
  TORCH_ARG(double, max_scale) = INFINITY;
  // The number of overflows until the scale is lowered; each further one lowers it again until the budget is refilled.
  // With more than 1, a skipped step need not lower get_scale().
  TORCH_ARG(int64_t, hysteresis) = 1;
  // The event that refills the budget: "growth" of the scale, or any "good_step".
  TORCH_ARG(std::string, hysteresis_refill) = "growth";
  // What update() does after an overflow with the scale at min_scale: "warn" once, or "raise" an error. Both name the
  // parameters. On CUDA a later update reacts; a captured graph does not.
  TORCH_ARG(std::string, on_floor) = "warn";
  // How the scale moves. "overflow", as torch's: it grows until gradients overflow. "headroom": it follows the largest
  // gradient of all optimizers in the last 512 good steps. It comes down before gradients overflow, and is always a
  // power of two. Factors and hysteresis must then be the defaults.
  TORCH_ARG(std::string, policy) = "overflow";
  // With that policy, how many bits the largest gradients stay below 2^16; 0 to 14.
  TORCH_ARG(int64_t, headroom_bits) = 2;
};

}  // namespace fusedamp
