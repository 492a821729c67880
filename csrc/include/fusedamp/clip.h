// Clips gradients by their total norm.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace fusedamp {

// Clips gradients by their total norm in place, by min(1, max_norm / (norm + 1e-6)), as torch's function does.
// Gradients may have different dtypes and devices; parameters without one are skipped. No wait for the device.
//
// max_norm: a number >= 0, or a tensor of 1 element, which is read on the device.
// norm_type: p of the p-norm, >= 0; INFINITY is the largest magnitude, 0 counts the nonzero elements.
// error_if_nonfinite: throw a c10::Error, before any gradient changes, if the norm is inf or NaN; only this option
//   waits for the device.
//
// Returns the norm before clipping: 0-d, on the device of the first gradient, FP32 (FP64 if a gradient is FP64).
// Accumulation is in FP64, so FP16 gradients cannot overflow it. Without gradients: 0.
// Throws c10::ValueError for a negative or NaN max_norm or norm_type, c10::TypeError for a max_norm tensor that is not
// one real.
// Cost: one read of the gradients and one read and write.
at::Tensor clip_grad_norm_(const std::vector<at::Tensor>& params, double max_norm, double norm_type = 2.0,
                           bool error_if_nonfinite = false);
at::Tensor clip_grad_norm_(const std::vector<at::Tensor>& params, const at::Tensor& max_norm, double norm_type = 2.0,
                           bool error_if_nonfinite = false);
at::Tensor clip_grad_norm_(const at::Tensor& param, double max_norm, double norm_type = 2.0,
                           bool error_if_nonfinite = false);
at::Tensor clip_grad_norm_(const at::Tensor& param, const at::Tensor& max_norm, double norm_type = 2.0,
                           bool error_if_nonfinite = false);

}  // namespace fusedamp
