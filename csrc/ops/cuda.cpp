// The ops on CUDA: on torch's current stream, in torch's memory, without waiting for the device.
#include "ops.h"
#include "resident.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace fusedamp {
namespace {

// One call: its device made current, its stream, and the memory that it holds until its kernels are queued.
class Cuda {
 public:
  explicit Cuda(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
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
  Cuda(const Cuda&) = delete;

  void step(const StepTable& table, const StepGroups& groups, const StepScalars& scalars, const StepLog& log) {
    cuda::step(device_, table, groups, scalars, log);
  }
  void unscale(const std::vector<GradRow>& rows, const float* inv_scale, float* found_inf) {
    cuda::unscale(device_, rows, inv_scale, found_inf);
  }
  void grad_stats(const std::vector<GradRow>& rows, const float* inv_scale, double norm_type, const StatsOutputs& out) {
    cuda::grad_stats(device_, rows, inv_scale, norm_type, out);
  }
  void check_grads(const std::vector<GradRow>& rows, const GradCheck& check) {
    cuda::check_grads(device_, rows, check);
  }
  void recode(const Recoding& job) { cuda::recode(device_, job); }
  void update_scale(const LossScaleRule& rule, float* scale, int32_t* growth_tracker, int32_t* budget,
                    const float* found_inf) {
    cuda::update_scale(device_, rule, scale, growth_tracker, budget, found_inf);
  }

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CUDA, m) { Ops<Cuda>::implement(m); }

}  // namespace fusedamp
