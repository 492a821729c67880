// The ops of linear layers on the CPU: products of 16-bit matrices are torch's FP32 products, and are rounded once.
// Where a processor has no FP16 arithmetic, torch's own FP16 products run at a tenth of that speed; its BF16 products
// are faster, but round the weight's gradient before it is added up.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "linear.h"

namespace fusedamp {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  Tensor operand(const Tensor& t) { return torch::stable::to(t, ScalarType::Float); }

  Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
    multiply(out, x, torch::stable::transpose(weight, 0, 1), bias ? &*bias : nullptr);
    return out;
  }
  Tensor input_grad(const Tensor& grad, const Tensor& weight) {
    Tensor out = torch::stable::new_empty(grad, {grad.size(0), weight.size(1)});
    multiply(out, grad, weight, nullptr);
    return out;
  }
  void weight_grad(Tensor& out, const Tensor& grad, const Tensor& x, bool add) {
    const bool rounds = out.scalar_type() != ScalarType::Float;
    Tensor product = rounds ? torch::stable::new_empty(grad, {grad.size(1), x.size(1)}) : out;
    multiply(product, torch::stable::transpose(grad, 0, 1), x, add ? &out : nullptr);
    if (rounds) torch::stable::copy_(out, product);
  }

  // Nothing is fused: torch has no product with such ends.
  template <class... Tensors>
  bool fused_gelu(const Tensors&...) {
    return false;
  }
  template <class... Tensors>
  bool fused_gelu_input_grad(const Tensors&...) {
    return false;
  }
  template <class... Tensors>
  bool fused_weight_grad(const Tensors&...) {
    return false;
  }

 private:
  // out = a b, or a b + added. Not through the dispatcher, where autocast would cast the operands back.
  static void multiply(Tensor& out, const Tensor& a, const Tensor& b, const Tensor* added) {
    TORCH_ERROR_CODE_CHECK(added ? aoti_torch_cpu_addmm_out(out.get(), added->get(), a.get(), b.get(), 1.0, 1.0)
                                 : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CPU, m) { LinearOps<Cpu>::implement(m); }

}  // namespace fusedamp
