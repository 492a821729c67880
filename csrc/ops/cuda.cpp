// The ops on CUDA: on torch's current stream, in torch's memory, without waiting for the device.
#include "cuda_place.h"
#include "ops.h"
#include "resident.h"

namespace fusedamp {
namespace {

class Cuda {
 public:
  explicit Cuda(const Tensor& like) : place_(like) {
    device_.stream = place_.stream();
    device_.multiprocessors = place_.attribute(cudaDevAttrMultiProcessorCount);
    device_.scratch = [this](int64_t bytes) { return place_.scratch(bytes); };
    device_.resident = [this](const void* table, int64_t bytes) {
      static auto& tables = *new ResidentTables;  // never destroyed: CUDA may be gone when statics are
      return place_.keep(tables.get(table, bytes, device_.stream, place_.like()));
    };
  }
  Cuda(const Cuda&) = delete;

  void step(const StepTable& table, const StepGroups& groups, const StepScalars& scalars, const StepLog& log,
            const Tally& tally) {
    cuda::step(device_, table, groups, scalars, log, tally);
  }
  void measure(const StepTable& table, const StepGroups& groups, const StepScalars& scalars) {
    cuda::measure(device_, table, groups, scalars);
  }
  void unscale(const std::vector<GradRow>& rows, const float* inv_scale, float* found_inf) {
    cuda::unscale(device_, rows, inv_scale, found_inf);
  }
  void grad_stats(const std::vector<GradRow>& rows, const float* inv_scale, double norm_type, const StatsOutputs& out,
                  const Numerics& numerics) {
    cuda::grad_stats(device_, rows, inv_scale, norm_type, out, numerics);
  }
  void check_grads(const std::vector<GradRow>& rows, const GradCheck& check, double* per_tensor,
                   const Numerics& numerics) {
    cuda::check_grads(device_, rows, check, per_tensor, numerics);
  }
  bool is_capturing() const { return place_.is_capturing(); }
  void recode(const Recoding& job) { cuda::recode(device_, job); }
  void record(const StepRecord& record) { cuda::record(device_, record); }
  void update_scale(const LossScaleRule& rule, float* scale, int32_t* growth_tracker, int32_t* budget,
                    const float* found_inf) {
    cuda::update_scale(device_, rule, scale, growth_tracker, budget, found_inf);
  }
  void update_scale_headroom(const HeadroomRule& rule, float* scale, HeadroomState* state, const float* found_inf,
                             const double* largest) {
    cuda::update_scale_headroom(device_, rule, scale, state, found_inf, largest);
  }

 private:
  CudaPlace place_;
  cuda::Device device_;
};

std::string cuda_origin() { return origin(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CUDA, m) { Ops<Cuda>::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(fusedamp, CompositeExplicitAutograd, m) { m.impl("_cuda_origin", TORCH_BOX(&cuda_origin)); }

}  // namespace fusedamp
