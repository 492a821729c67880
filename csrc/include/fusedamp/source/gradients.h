// Gradients in the form that the ops take: real, dense, grouped by device.
#pragma once
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cmath>

#include "headroom.h"
#include "layout.h"

namespace fusedamp::detail {

using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

inline Tensors params_of(const torch::optim::Optimizer& optimizer) {
  Tensors params;
  for (const auto& group : optimizer.param_groups())
    params.insert(params.end(), group.params().begin(), group.params().end());
  return params;
}

// The gradients of `params` that have one.
inline Tensors gradients_of(const Tensors& params) {
  Tensors grads;
  grads.reserve(params.size());
  for (const Tensor& param : params)
    if (param.defined() && param.grad().defined()) grads.push_back(param.grad());
  return grads;
}

// "torch.sparse_csr"
inline std::string layout_name(const Tensor& tensor) {
  switch (tensor.layout()) {
    case at::kSparseCsr: return "torch.sparse_csr";
    case at::kSparseCsc: return "torch.sparse_csc";
    case at::kSparseBsr: return "torch.sparse_bsr";
    case at::kSparseBsc: return "torch.sparse_bsc";
    case at::kMkldnn: return "torch._mkldnn";
    case at::kJagged: return "torch.jagged";
    default: return text(tensor.layout());
  }
}

// Within it torch's operations may modify `grads`, even if inference mode created them.
struct Writing {
  explicit Writing(const Tensors& grads)
      : mode(std::any_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.is_inference(); })) {}
  c10::InferenceMode mode;
  at::NoGradGuard no_grad;
};

// The current gradients of `params`, which may lack them. The constructor changes no value, but may replace a gradient
// that is sparse and uncoalesced, or expanded.
class Gradients {
 public:
  struct Bucket {
    Tensors tensors;
    std::vector<int64_t> positions;  // of their parameters in `params`
  };

  // magnitudes: take the absolute values of complex gradients (read only), which norms other than 2 need.
  explicit Gradients(const Tensors& params, bool magnitudes = false) {
    originals.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      if (!params[i].defined()) refuse("expected param to be torch.Tensor, got an undefined tensor");
      const Tensor& grad = params[i].grad();
      if (!grad.defined()) continue;
      const Tensor tensor = is_plain(grad) ? keep(grad) : real(params[i], grad, magnitudes);
      auto& bucket = by_device.of(tensor.device());
      bucket.tensors.push_back(tensor);
      bucket.positions.push_back(static_cast<int64_t>(i));
    }
    if (!params.empty()) home_ = params[0].device();
  }

  ByDevice<Bucket> by_device;
  Tensors originals;

  // Checks the gradients with one op per device.
  ByDevice<GradStats> stats(const Tensor& inv_scale = {}, double norm_type = 2.0,
                            LargestGradient* largest = nullptr) const {
    ByDevice<GradStats> found;
    for (const auto& [device, bucket] : by_device)
      found.of(device) = grad_stats(bucket.tensors, inv_scale.defined() ? on(inv_scale, device) : inv_scale, norm_type,
                                    largest ? largest->numerics(device, bucket.tensors.size()) : Numerics());
    return found;
  }

  // The norm from a gradient check: 0-d, FP64, on `device`. clip_coef: of earlier clippings; or undefined.
  Tensor norm(const ByDevice<GradStats>& stats, double norm_type, c10::Device device,
              const Tensor& clip_coef = {}) const {
    const bool largest = std::isinf(norm_type);
    Tensors totals;
    for (const auto& [where, stat] : stats) totals.push_back(on(stat.total, home_.value()));
    Tensor total = totals.empty() ? at::zeros({}, options(device, at::kDouble)) : totals[0];
    if (totals.size() > 1) total = largest ? at::stack(totals).amax() : at::stack(totals).sum();
    total = on(total, device);
    if (clip_coef.defined() && norm_type != 0) total = total * (largest ? clip_coef : clip_coef.pow(norm_type));
    return largest || norm_type == 0 ? total.clone() : total.pow(1.0 / norm_type);
  }

  // Multiplies all gradients in place by a 0-d FP64 tensor: FP64 gradients in FP64, others in FP32.
  void multiply_(const Tensor& factor) const {
    for (const auto& [device, bucket] : by_device) {
      const Tensor here = on(factor, device);
      Tensors wide, narrow;
      for (const Tensor& grad : bucket.tensors) (grad.scalar_type() == at::kDouble ? wide : narrow).push_back(grad);
      if (!wide.empty()) {
        const Writing guard(wide);
        at::_foreach_mul_(wide, here);
      }
      unscale_(narrow, here.to(at::kFloat), no_overflow(device));
    }
    write_back();
  }

  // Copies results from dense copies back into gradients with gaps.
  void write_back() const {
    for (const auto& [target, dense] : copies_) {
      const Writing guard({target});
      target.copy_(dense);
    }
  }

  // Whether tensors are copies of gradients, for writing back or, as magnitudes, for reading only.
  bool has_copies() const { return magnitudes_ || !copies_.empty(); }

  // The dtype of reported norms: FP64 if a gradient is FP64, else FP32.
  at::ScalarType widest() const {
    for (const auto& [device, bucket] : by_device)
      for (const Tensor& grad : bucket.tensors)
        if (grad.scalar_type() == at::kDouble) return at::kDouble;
    return at::kFloat;
  }

 private:
  static bool is_plain(const Tensor& grad) {
    return grad.layout() == at::kStrided && grad.is_contiguous() && !grad.is_complex();
  }

  const Tensor& keep(const Tensor& grad) { return originals.emplace_back(grad); }

  Tensor real(const Tensor& param, Tensor grad, bool magnitudes) {
    Tensor target;
    if (grad.layout() == at::kSparse) {
      // The gradient is the sum of duplicates, and only that sum shows its own overflow.
      grad = grad.coalesce();
      if (!grad._values().is_non_overlapping_and_dense())
        grad = at::_sparse_coo_tensor_unsafe(grad._indices(), grad._values().clone(at::MemoryFormat::Contiguous),
                                             grad.sizes(), grad.options(), /*is_coalesced=*/true);
      param.mutable_grad() = grad;
      target = grad._values();
    } else if (grad.layout() == at::kStrided) {
      if (!grad.is_contiguous() && overlaps_itself(grad))
        grad = param.mutable_grad() = grad.clone(at::MemoryFormat::Contiguous);
      target = grad;
    } else {
      refuse_value(text("[GradScaler] a gradient of shape ", list_text(grad.sizes()), " has layout ", layout_name(grad),
                        "; expected torch.strided or torch.sparse_coo. Convert it with .to_dense() or ",
                        ".to_sparse_coo()."));
    }
    keep(grad);
    if (!magnitudes || !target.is_complex()) return dense(target);
    magnitudes_ = true;
    return target.abs();
  }

  Tensor dense(const Tensor& target) {
    Tensor dense = target;
    if (!(target.is_contiguous() || target.is_non_overlapping_and_dense()) || target.is_conj()) {
      dense = target.clone(at::MemoryFormat::Contiguous).resolve_conj();
      copies_.emplace_back(target, dense);
    }
    return dense.is_complex() ? at::view_as_real(dense) : dense;
  }

  std::optional<c10::Device> home_;  // of the first parameter
  bool magnitudes_ = false;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

// The version counters of tensors, and whether they are still the same. A tensor without one, which inference mode
// created, never counts as unchanged.
class Versions {
 public:
  explicit Versions(const Tensors& tensors) {
    seen_.reserve(tensors.size());
    for (const Tensor& tensor : tensors) seen_.push_back(tensor.is_inference() ? kNone : tensor._version());
  }
  bool match(const Tensors& tensors) const {
    if (tensors.size() != seen_.size()) return false;
    for (size_t i = 0; i < seen_.size(); ++i)
      if (seen_[i] == kNone || tensors[i].is_inference() || tensors[i]._version() != seen_[i]) return false;
    return true;
  }

 private:
  static constexpr int64_t kNone = -1;
  std::vector<int64_t> seen_;
};

// Identity and version of tensors, which it keeps alive, so that their addresses are not reused.
class Stamp {
 public:
  explicit Stamp(Tensors tensors) : seen_(std::move(tensors)), versions_(seen_) {}

  bool matches(const Tensors& tensors) const {
    const auto same = [](const Tensor& a, const Tensor& b) { return a.is_same(b); };
    return std::equal(seen_.begin(), seen_.end(), tensors.begin(), tensors.end(), same) && versions_.match(tensors);
  }

 private:
  Tensors seen_;
  Versions versions_;
};

}  // namespace fusedamp::detail
