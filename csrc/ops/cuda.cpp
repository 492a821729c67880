// The ops on CUDA: on torch's current stream, in torch's memory, without waiting for the device.
#include <torch/csrc/stable/library.h>

#include "resident.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace fusedamp {
namespace {

using torch::headeronly::ScalarType;

// One call: its device made current, its stream, and the memory that it holds until its kernels are queued.
class Call {
 public:
  explicit Call(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    const int32_t index = like.get_device_index();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    check(cudaSetDevice(index));  // torch's CUDA runtime is another copy than the one in this object
    device_.stream = static_cast<cudaStream_t>(stream);
    check(cudaDeviceGetAttribute(&device_.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    device_.scratch = [this](int64_t bytes) {
      return keep(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    };
    device_.resident = [this](const void* table, int64_t bytes) {
      static auto& tables = *new ResidentTables;  // never destroyed: CUDA may be gone when statics are
      return keep(tables.get(table, bytes, device_.stream, like_));
    };
  }
  Call(const Call&) = delete;

  const cuda::Device& device() const { return device_; }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "fusedamp: CUDA error: ", cudaGetErrorString(error));
  }
  void* keep(Tensor memory) {
    kept_.push_back(std::move(memory));
    return kept_.back().data_ptr();
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Device device_;
  Tensors kept_;
};

template <const char* const& kName>
void step(Tensors params, Tensors grads, Tensors masters, Tensors states, Tensors steps, Tensors scales, double lr,
          std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor, OptionalTensor inv_scale,
          OptionalTensor clip_coef, OptionalTensor found_inf, std::vector<int64_t> seeds, bool stochastic_rounding) {
  if (params.empty()) return;
  const std::string op = kName;
  const StepLists lists = {params, grads, masters, states, steps, scales, seeds};
  const CheckedStep checked =
      checked_step(op, lists, lr, hyper, maximize, lr_tensor, inv_scale, clip_coef, found_inf, stochastic_rounding);
  cuda::step(Call(params[0]).device(), checked.rule, checked.rows, checked.scalars);
}

void packed_step_(Tensor rows, Tensor grads, Tensor like, std::string op, int64_t states, double lr,
                  std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor, OptionalTensor inv_scale,
                  OptionalTensor clip_coef, OptionalTensor found_inf, bool stochastic_rounding) {
  const StepScalars scalars =
      step_scalars(op, like, lr, hyper, maximize, lr_tensor, inv_scale, clip_coef, found_inf, stochastic_rounding);
  const RuleId rule = rule_for(op, 1, states);
  const std::vector<StepRow> unpacked = packed_step_rows(op, rule, rows, grads);
  cuda::step(Call(like).device(), rule, unpacked, scalars);
}

void unscale_(Tensors grads, Tensor inv_scale, Tensor found_inf) {
  if (grads.empty()) return;
  const auto rows = grad_rows("unscale_", grads, true);
  const float* inv = scalar_at("unscale_", "inv_scale", inv_scale, grads[0]);
  float* found = scalar_at("unscale_", "found_inf", found_inf, grads[0]);
  cuda::unscale(Call(grads[0]).device(), rows, inv, found);
}

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Stats stats_of(const std::vector<GradRow>& rows, const Tensor& like, const OptionalTensor& inv_scale,
               double norm_type) {
  const auto n = static_cast<int64_t>(rows.size());
  const float* inv = scalar_at("grad_stats", "inv_scale", inv_scale, like);
  Tensor found_inf = torch::stable::new_empty(like, {}, ScalarType::Float);
  Tensor total = torch::stable::new_empty(like, {}, ScalarType::Double);
  Tensor per_tensor = torch::stable::new_empty(like, {n}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(like, {n, 3}, ScalarType::Long);
  const cuda::StatsOutputs out = {static_cast<float*>(found_inf.data_ptr()), static_cast<double*>(total.data_ptr()),
                                  static_cast<double*>(per_tensor.data_ptr()),
                                  static_cast<int64_t*>(counts.data_ptr())};
  cuda::grad_stats(Call(like).device(), rows, inv, norm_type, out);
  return {found_inf, total, per_tensor, counts};
}

Stats grad_stats(Tensors grads, OptionalTensor inv_scale, double norm_type) {
  STD_TORCH_CHECK(!grads.empty(), "[grad_stats] grads is empty; expected at least one tensor");
  return stats_of(grad_rows("grad_stats", grads), grads[0], inv_scale, norm_type);
}

Stats packed_grad_stats(Tensor rows, Tensor like, OptionalTensor inv_scale, double norm_type) {
  return stats_of(packed_grad_rows(rows), like, inv_scale, norm_type);
}

void update_scale_(Tensor scale, Tensor growth_tracker, OptionalTensor hysteresis_tracker, Tensor found_inf,
                   double growth_factor, double backoff_factor, int64_t growth_interval, double min_scale,
                   double max_scale, int64_t hysteresis, bool refill_on_good_step) {
  const char* op = "update_scale_";
  const LossScaleRule rule = {growth_factor,   backoff_factor, min_scale,          max_scale,
                              growth_interval, hysteresis,     refill_on_good_step};
  cuda::update_scale(Call(scale).device(), rule, scalar_at(op, "scale", scale, scale),
                     int_scalar_at(op, "growth_tracker", growth_tracker, scale),
                     int_scalar_at(op, "hysteresis_tracker", hysteresis_tracker, scale),
                     scalar_at(op, "found_inf", found_inf, scale));
}

#define FUSEDAMP_OP(op, Hyper) const char* const kName_##op = #op "_";
#include "../math/optimizers.def"

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CUDA, m) {
  m.impl("unscale_", TORCH_BOX(&unscale_));
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
  m.impl("_check_step", TORCH_BOX(&check_step));
  m.impl("_find_shared_memory", TORCH_BOX(&find_shared_memory));
  m.impl("update_scale_", TORCH_BOX(&update_scale_));
  m.impl("_packed_step_", TORCH_BOX(&packed_step_));
  m.impl("_packed_grad_stats", TORCH_BOX(&packed_grad_stats));
#define FUSEDAMP_OP(op, Hyper) m.impl(#op "_", TORCH_BOX(&step<kName_##op>));
#include "../math/optimizers.def"
}

}  // namespace fusedamp
