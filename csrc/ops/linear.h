// The ops of linear layers once, for every backend: shapes, checks, outputs, and what runs where nothing is fused.
// All tensors are matrices, row by row: x [M, K], weight [N, K], grad and y [M, N], in one 16-bit dtype.
//
// A backend multiplies such matrices with FP32 sums:
//   operand(t)                          t as the products below take it, in 16 bits or in FP32
//   linear(x, weight, bias)             x weight^T + bias, in FP32
//   input_grad(grad, weight)            grad weight, in FP32
//   weight_grad(out, grad, x, add)      grad^T x into out, or added to it
// and returns true where it has fused all of:
//   fused_gelu(y, pre, x, weight, bias)                        pre = linear, y = gelu(pre)
//   fused_gelu_input_grad(out, bias_grad, grad, weight, pre)   out = input_grad * gelu'(pre), bias_grad = its sums
//   fused_weight_grad(out, bias_grad, grad, x, add)            weight_grad, and bias_grad = the sums of grad
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "checks.h"

namespace fusedamp {

inline void need_matrix(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  need_device(op, {name}, t, {like_name}, like);
  if (t.layout() != torch::headeronly::Layout::Strided || t.dim() != 2)
    fail(op, name, " has shape ", list_text(t.sizes()), "; expected a strided matrix. Flatten the batch dimensions");
  const ScalarType got = t.scalar_type();
  if (got != ScalarType::Half && got != ScalarType::BFloat16)
    fail(op, name, " is ", dtype_name(t), "; expected float16 or bfloat16. Cast it, or use torch's own operations");
  if (got != like.scalar_type())
    fail(op, name, " is ", dtype_name(t), "; expected ", dtype_name(like), ", like ", like_name, ". Cast one of them");
}

inline void need_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t wanted,
                      const char* like_name, const Tensor& like) {
  if (t.size(dim) != wanted)
    fail(op, name, " has shape ", list_text(t.sizes()), "; expected ", wanted, " ", dim == 0 ? "rows" : "columns",
         ", as ", like_name, " has shape ", list_text(like.sizes()));
}

// x [M, K] and weight [N, K], and the bias [N].
inline void check_linear(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  need_matrix(op, "x", x, "x", x);
  need_matrix(op, "weight", weight, "x", x);
  need_size(op, "x", x, 1, weight.size(1), "weight", weight);
  if (!bias) return;
  need_device(op, {"bias"}, *bias, {"x"}, x);
  if (bias->dim() != 1 || bias->size(0) != weight.size(0) || bias->scalar_type() != x.scalar_type())
    fail(op, "bias is ", dtype_name(*bias), " of shape ", list_text(bias->sizes()), "; expected ", dtype_name(x), " [",
         weight.size(0), "], as weight has shape ", list_text(weight.sizes()));
}

// grad [M, N] and weight [N, K].
inline void check_input_grad(const char* op, const Tensor& grad, const Tensor& weight) {
  need_matrix(op, "grad", grad, "grad", grad);
  need_matrix(op, "weight", weight, "grad", grad);
  need_size(op, "weight", weight, 0, grad.size(1), "grad", grad);
}

inline void need_float32_or(const char* op, const char* name, ScalarType got, const char* like_name,
                            const Tensor& like) {
  if (got != ScalarType::Float && got != like.scalar_type())
    fail(op, name, " is ", dtype_name(got), "; expected float32 or ", dtype_name(like), ", like ", like_name);
}

// FP32 sums over the rows.
inline Tensor sum_of_rows(const Tensor& t) {
  const int64_t rows[] = {0};
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1), false, ScalarType::Float);
}

inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// An operation of torch on one tensor or two, with the tanh approximation of GELU.
template <class... Inputs>
Tensor call_gelu(const char* name, const Inputs&... inputs) {
  StableIValue stack[] = {torch::stable::detail::from(inputs)..., torch::stable::detail::from(std::string("tanh"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class Backend>
struct LinearOps {
  static Tensor linear(Tensor x, Tensor weight, OptionalTensor bias) {
    check_linear("linear", x, weight, bias);
    Backend backend(x);
    return in_dtype(linear_of(backend, x, weight, bias), x.scalar_type());
  }

  static Tensor linear_input_grad(Tensor grad, Tensor weight) {
    check_input_grad("linear_input_grad", grad, weight);
    Backend backend(grad);
    return in_dtype(backend.input_grad(backend.operand(grad), backend.operand(weight)), grad.scalar_type());
  }

  static std::tuple<Tensor, Tensor> linear_gelu(Tensor x, Tensor weight, OptionalTensor bias) {
    check_linear("linear_gelu", x, weight, bias);
    Backend backend(x);
    Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)}), pre = torch::stable::empty_like(y);
    if (backend.fused_gelu(y, pre, x, weight, bias)) return {y, pre};
    const Tensor product = linear_of(backend, x, weight, bias);
    return {in_dtype(call_gelu("aten::gelu", product), x.scalar_type()), in_dtype(product, x.scalar_type())};
  }

  static std::tuple<Tensor, Tensor> linear_gelu_input_grad(Tensor grad, Tensor weight, Tensor pre, bool bias_grad,
                                                           ScalarType bias_dtype) {
    const char* op = "linear_gelu_input_grad";
    check_input_grad(op, grad, weight);
    need_matrix(op, "pre", pre, "grad", grad);
    need_size(op, "pre", pre, 0, grad.size(0), "grad", grad);
    need_size(op, "pre", pre, 1, weight.size(1), "weight", weight);
    need_float32_or(op, "bias_dtype", bias_dtype, "grad", grad);
    Backend backend(grad);
    Tensor out = torch::stable::new_empty(grad, {pre.size(0), pre.size(1)});
    // The library stores sums in the dtype of the product; others are made of it.
    const bool fuse_bias = bias_grad && bias_dtype == grad.scalar_type();
    Tensor sums = torch::stable::new_empty(grad, {fuse_bias ? pre.size(1) : 0}, bias_dtype);
    if (!backend.fused_gelu_input_grad(out, sums, grad, weight, pre)) {
      const Tensor product = backend.input_grad(backend.operand(grad), backend.operand(weight));
      const Tensor before = torch::stable::contiguous(in_dtype(pre, ScalarType::Float));
      out = in_dtype(call_gelu("aten::gelu_backward", product, before), grad.scalar_type());
    } else if (fuse_bias) {
      return {out, sums};
    }
    return {out, bias_grad ? in_dtype(sum_of_rows(out), bias_dtype) : sums};
  }

  static std::tuple<Tensor, Tensor> linear_weight_grad(Tensor grad, Tensor x, ScalarType dtype, bool bias_grad) {
    const char* op = "linear_weight_grad";
    check_weight_grad(op, grad, x);
    need_float32_or(op, "dtype", dtype, "grad", grad);
    Tensor out = torch::stable::new_empty(grad, {grad.size(1), x.size(1)}, dtype);
    const Tensor sums = weight_grad(out, grad, x, false, bias_grad);
    return {out, sums};
  }

  static Tensor linear_weight_grad_(Tensor acc, Tensor grad, Tensor x, bool bias_grad) {
    const char* op = "linear_weight_grad_";
    check_weight_grad(op, grad, x);
    need_device(op, {"acc"}, acc, {"grad"}, grad);
    const int64_t shape[] = {grad.size(1), x.size(1)};
    const auto got = acc.sizes();
    if (acc.scalar_type() != ScalarType::Float || !std::equal(got.begin(), got.end(), shape, shape + 2) ||
        !acc.is_contiguous())
      fail(op, "acc is ", dtype_name(acc), " of shape ", list_text(got), ", strides ", list_text(acc.strides()),
           "; expected contiguous float32 [", shape[0], ", ", shape[1], "], as grad has shape ",
           list_text(grad.sizes()), " and x has shape ", list_text(x.sizes()));
    std::vector<Span> spans;
    add_span(spans, true, {"acc"}, acc, data_of(op, {"acc"}, acc), 4);
    for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"x", &x}})
      if (t->numel() > 0) {
        const char* begin = static_cast<const char*>(t->data_ptr());
        const int64_t last = (t->size(0) - 1) * t->stride(0) + (t->size(1) - 1) * t->stride(1);
        spans.push_back({begin, begin + 2 * (last + 1), false, {name}, t});
      }
    need_own_memory(op, spans);
    return weight_grad(acc, grad, x, true, bias_grad);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("_linear", TORCH_BOX(&LinearOps::linear));
    m.impl("_linear_input_grad", TORCH_BOX(&LinearOps::linear_input_grad));
    m.impl("linear_gelu", TORCH_BOX(&LinearOps::linear_gelu));
    m.impl("linear_gelu_input_grad", TORCH_BOX(&LinearOps::linear_gelu_input_grad));
    m.impl("linear_weight_grad", TORCH_BOX(&LinearOps::linear_weight_grad));
    m.impl("linear_weight_grad_", TORCH_BOX(&LinearOps::linear_weight_grad_));
  }

 private:
  // grad [M, N] and x [M, K].
  static void check_weight_grad(const char* op, const Tensor& grad, const Tensor& x) {
    need_matrix(op, "grad", grad, "grad", grad);
    need_matrix(op, "x", x, "grad", grad);
    need_size(op, "x", x, 0, grad.size(0), "grad", grad);
  }

  static Tensor linear_of(Backend& backend, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    OptionalTensor added;
    if (bias) added = backend.operand(*bias);
    return backend.linear(backend.operand(x), backend.operand(weight), added);
  }

  // Writes or adds the weight's gradient; returns the bias's, in the dtype of out, or an empty tensor.
  static Tensor weight_grad(Tensor& out, const Tensor& grad, const Tensor& x, bool add, bool bias_grad) {
    const ScalarType dtype = out.scalar_type();
    Tensor sums = torch::stable::new_empty(grad, {bias_grad ? grad.size(1) : 0}, dtype);
    if (add && grad.size(0) == 0) return bias_grad ? torch::stable::zero_(sums) : sums;
    Backend backend(grad);
    if (bias_grad && backend.fused_weight_grad(out, sums, grad, x, add)) return sums;
    const Tensor operand = backend.operand(grad);
    backend.weight_grad(out, operand, backend.operand(x), add);
    return bias_grad ? in_dtype(sum_of_rows(operand), dtype) : sums;
  }
};

}  // namespace fusedamp
