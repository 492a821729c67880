// The ops of linear layers as CUDA has them (csrc/ops/lt_linear.h), on the CPU: products by the emulated cuBLASLt on
// host addresses, torch's CPU products where it refuses. Replaces the CPU's kernels of the process that loads it.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../../csrc/ops/lt_linear.h"

namespace fusedamp {
namespace {

void* emulated_handle() {
  static void* handle = [] {
    void* made = nullptr;
    void* library = dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_NOLOAD);
    STD_TORCH_CHECK(library, "the emulated cuBLASLt is not loaded");
    reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasLtCreate"))(&made);
    return made;
  }();
  return handle;
}

class Place {
 public:
  explicit Place(const Tensor& like) : like_(like) {
    device_.handle = emulated_handle();
    device_.stream = reinterpret_cast<CUstream_st*>(0x57);
    device_.index = 0;
    device_.capability = 90;
    device_.scratch = [this](int64_t bytes) {
      kept_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
      return kept_.back().data_ptr();
    };
  }
  Place(const Place&) = delete;

  const cuda::LtDevice& device() const { return device_; }
  Tensor multiply_into_float32(const Tensor& a, const Tensor& b) {
    const Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(1)}, ScalarType::Float);
    const Tensor wide_a = torch::stable::to(a, ScalarType::Float), wide_b = torch::stable::to(b, ScalarType::Float);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), wide_a.get(), wide_b.get()));
    return out;
  }

 private:
  Tensor like_;
  Tensors kept_;
  cuda::LtDevice device_;
};

std::string product_uses() { return cuda::gemm_uses(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CPU, m) { LinearOps<LtLinear<Place>>::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(fusedamp, CompositeExplicitAutograd, m) { m.impl("_product_uses", TORCH_BOX(&product_uses)); }

}  // namespace fusedamp
