// The ops of linear layers on CUDA: on torch's current stream and cuBLAS handle, in torch's memory.
#include <torch/csrc/stable/c/shim.h>

#include "cuda_place.h"
#include "lt_linear.h"

namespace fusedamp {
namespace {

class Place {
 public:
  explicit Place(const Tensor& like) : place_(like) {
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&device_.handle));
    device_.stream = place_.stream();
    device_.index = place_.index();
    device_.capability =
        10 * place_.attribute(cudaDevAttrComputeCapabilityMajor) + place_.attribute(cudaDevAttrComputeCapabilityMinor);
    device_.scratch = [this](int64_t bytes) { return place_.scratch(bytes); };
  }
  Place(const Place&) = delete;

  const cuda::LtDevice& device() const { return device_; }

  Tensor multiply_into_float32(const Tensor& a, const Tensor& b) {
    StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                            torch::stable::detail::from(ScalarType::Float)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

 private:
  CudaPlace place_;
  cuda::LtDevice device_;
};

std::string product_uses() { return cuda::gemm_uses(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CUDA, m) { LinearOps<LtLinear<Place>>::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(fusedamp, CompositeExplicitAutograd, m) { m.impl("_product_uses", TORCH_BOX(&product_uses)); }

}  // namespace fusedamp
