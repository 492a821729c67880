// The ops of linear layers on the CPU: products of 16-bit matrices are torch's FP32 products, and are rounded once.
// Where a processor has no FP16 arithmetic, torch's own FP16 products run at a tenth of that speed; its BF16 products
// are faster, but round the weight's gradient before it is added up.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "linear.h"

namespace fusedamp {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  Tensor operand(const Tensor& t) {
    const int64_t rows = t.size(0), columns = t.dim() == 2 ? t.size(1) : 1;
    Tensor wide = empty(rows, columns, t.dim());
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(wide.get(), t.get(), 0));
    return wide;
  }
  Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    Tensor out = empty(x.size(0), weight.size(0));
    multiply(out, x, transposed(weight), bias ? &*bias : nullptr);
    return out;
  }
  Tensor input_grad(const Tensor& grad, const Tensor& weight) {
    Tensor out = empty(grad.size(0), weight.size(1));
    multiply(out, grad, weight, nullptr);
    return out;
  }
  void weight_grad(Tensor& out, const Tensor& grad, const Tensor& x, bool add) {
    const bool rounds = out.scalar_type() != ScalarType::Float;
    Tensor product = rounds ? empty(grad.size(1), x.size(1)) : out;
    multiply(product, transposed(grad), x, add ? &out : nullptr);
    if (rounds) TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out.get(), product.get(), 0));
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
  // torch's C functions below are no calls of its dispatcher: these cost more than the work on small layers, and
  // autocast would cast the operands back.
  static Tensor empty(int64_t rows, int64_t columns, int64_t dimensions = 2) {
    const int64_t sizes[] = {rows, columns}, strides[] = {dimensions == 2 ? columns : 1, 1};
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, aoti_torch_dtype_float32(),
                                                    aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
  }
  static Tensor transposed(const Tensor& t) {
    const int64_t sizes[] = {t.size(1), t.size(0)}, strides[] = {t.stride(1), t.stride(0)};
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &view));
    return Tensor(view);
  }
  // out = a b, or a b + added.
  static void multiply(Tensor& out, const Tensor& a, const Tensor& b, const Tensor* added) {
    TORCH_ERROR_CODE_CHECK(added ? aoti_torch_cpu_addmm_out(out.get(), added->get(), a.get(), b.get(), 1.0, 1.0)
                                 : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CPU, m) { LinearOps<Cpu>::implement(m); }

}  // namespace fusedamp
