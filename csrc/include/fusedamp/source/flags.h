// Small tensors on devices: overflow flags, the largest gradient, and where they are made.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <utility>
#include <vector>

namespace fusedamp::detail {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// Within it new tensors can later be modified everywhere, also outside of inference mode, and nothing is recorded.
struct Lasting {
  c10::InferenceMode off{false};
  at::NoGradGuard no_grad;
};

// Values by device, in the order of their first use.
template <class T>
struct ByDevice : std::vector<std::pair<c10::Device, T>> {
  T& of(c10::Device device) {
    for (auto& [where, value] : *this)
      if (where == device) return value;
    return this->emplace_back(device, T()).second;
  }
};
using PerDevice = ByDevice<Tensor>;

// `tensor` on `device` without a wait; only a copy to the CPU waits, as the host reads it next.
inline Tensor on(const Tensor& tensor, c10::Device device) {
  if (tensor.device() == device) return tensor;
  return tensor.to(tensor.options().device(device), /*non_blocking=*/!device.is_cpu());
}

inline at::TensorOptions options(c10::Device device, at::ScalarType dtype) {
  return at::TensorOptions().dtype(dtype).device(device);
}

inline Tensor no_overflow(c10::Device device) { return at::zeros({}, options(device, at::kFloat)); }

inline Tensor largest_of(const Tensors& values) { return values.size() == 1 ? values[0] : at::stack(values).amax(); }

// Rounded once: an FP32 division may be imprecise on the device.
inline Tensor inverse_of(const Tensor& scale) { return scale.to(at::kDouble).reciprocal().to(at::kFloat); }

// One FP32 flag on `device`: positive if one of `flags` is, else 0.
inline Tensor combine(const Tensors& flags, c10::Device device) {
  if (flags.empty()) return no_overflow(device);
  Tensors moved;
  for (const Tensor& flag : flags) moved.push_back(on(flag, device));
  return largest_of(moved);
}

// The largest of `found` on `device`: FP64, 0-d; 0 of none.
inline Tensor largest_on(const Tensors& found, c10::Device device) {
  if (found.empty()) return at::zeros({}, options(device, at::kDouble));
  Tensors moved;
  for (const Tensor& value : found) moved.push_back(on(value, device));
  return largest_of(moved);
}

inline void append(Tensors& to, const PerDevice& from) {
  for (const auto& [device, value] : from) to.push_back(value);
}

}  // namespace fusedamp::detail
