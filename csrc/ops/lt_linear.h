// The backend of linear layers on cuBLASLt. What the library refuses is made of FP32 products: its own without the
// fused part, or torch's. gemm_uses() tells what and why.
//
// A Place says where a product runs, and has torch's product there:
//   Place(like), device()             of a tensor
//   multiply_into_float32(a, b)       a b of 16-bit matrices, not empty, in FP32
#pragma once
#include "../engine/cuda/lt_gemm.h"
#include "linear.h"

namespace fusedamp {

template <class Place>
class LtLinear {
 public:
  explicit LtLinear(const Tensor& like) : place_(like) {}

  Tensor operand(const Tensor& t) { return is_by_rows(t) ? t : torch::stable::contiguous(t); }

  Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)}, ScalarType::Float);
    const Gemm gemm = linear_forward(shape(out, x, out), rows(x), rows(weight), written(out));
    if (!runs(gemm)) out = in_float32(x, torch::stable::transpose(weight, 0, 1));
    return bias ? torch::stable::subtract(out, torch::stable::to(*bias, ScalarType::Float), -1.0) : out;
  }
  Tensor input_grad(const Tensor& grad, const Tensor& weight) {
    Tensor out = torch::stable::new_empty(grad, {grad.size(0), weight.size(1)}, ScalarType::Float);
    const Gemm gemm = linear_input_grad(shape(grad, weight, out), rows(grad), rows(weight), written(out));
    return runs(gemm) ? out : in_float32(grad, weight);
  }
  void weight_grad(Tensor& out, const Tensor& grad, const Tensor& x, bool add) {
    Gemm gemm = linear_weight_grad(shape(grad, x, out), rows(grad), rows(x), written(out));
    gemm.accumulate = add;
    if (runs(gemm)) return;
    const Tensor transposed = torch::stable::transpose(grad, 0, 1);
    const Tensor product = in_float32(transposed, x);
    torch::stable::copy_(out, add ? torch::stable::subtract(out, product, -1.0) : product);
  }

  bool fused_gelu(Tensor& y, Tensor& pre, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    const Tensor a = operand(x), b = operand(weight);
    Gemm gemm = linear_forward(shape(y, a, y), rows(a), rows(b), written(y));
    gemm.epilogue = bias ? Epilogue::gelu_aux_bias : Epilogue::gelu_aux;
    const OptionalTensor added = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : bias;
    if (added) gemm.vector = added->data_ptr();
    gemm.aux = pre.data_ptr();
    gemm.ldaux = written(pre).ld;
    return runs(gemm);
  }
  bool fused_gelu_input_grad(Tensor& out, Tensor& sums, const Tensor& grad, const Tensor& weight, const Tensor& pre) {
    const Tensor a = operand(grad), b = operand(weight), before = operand(pre);
    Gemm gemm = linear_input_grad(shape(a, b, out), rows(a), rows(b), written(out));
    gemm.epilogue = sums.numel() > 0 ? Epilogue::dgelu_bias_grad : Epilogue::dgelu;
    if (sums.numel() > 0) gemm.vector = sums.data_ptr();
    gemm.aux = before.data_ptr();
    gemm.ldaux = rows(before).ld;
    return runs(gemm);
  }
  bool fused_weight_grad(Tensor& out, Tensor& sums, const Tensor& grad, const Tensor& x, bool add) {
    const Tensor a = operand(grad), b = operand(x);
    Gemm gemm = linear_weight_grad(shape(a, b, out), rows(a), rows(b), written(out));
    gemm.accumulate = add;
    gemm.epilogue = Epilogue::bias_grad;
    gemm.vector = sums.data_ptr();
    return runs(gemm);
  }

 private:
  static bool is_by_rows(const Tensor& t) {
    if (t.dim() == 1) return t.is_contiguous();
    return (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1));
  }
  static int64_t ld_of(const Tensor& t) { return t.size(0) <= 1 ? std::max<int64_t>(t.size(1), 1) : t.stride(0); }
  static Rows rows(const Tensor& t) { return {t.data_ptr(), ld_of(t)}; }
  static MutableRows written(const Tensor& t) { return {t.data_ptr(), ld_of(t)}; }

  // Of y or its gradient [rows, out] and a matrix with `in` columns.
  static LinearShape shape(const Tensor& y, const Tensor& other, const Tensor& output) {
    const auto dtype = [](const Tensor& t) {
      return t.scalar_type() == ScalarType::Float  ? DType::f32
             : t.scalar_type() == ScalarType::Half ? DType::f16
                                                   : DType::bf16;
    };
    return {y.size(0), other.size(1), y.size(1), dtype(other), dtype(output)};
  }

  // torch's product of two matrices.
  Tensor in_float32(const Tensor& a, const Tensor& b) {
    if (a.numel() == 0 || b.numel() == 0) return torch::stable::new_zeros(a, {a.size(0), b.size(1)}, ScalarType::Float);
    return place_.multiply_into_float32(a, b);
  }

  bool runs(const Gemm& gemm) { return cuda::run_gemm(place_.device(), gemm) == nullptr; }

  Place place_;
};

}  // namespace fusedamp
