// A matrix product in column-major terms, as BLAS has them, and the three products of a linear layer.
#pragma once
#include "../include/fusedamp/rows.h"

namespace fusedamp {

// What is computed along with the product, after D's value and before its rounding. GELU is the tanh approximation.
enum class Epilogue : uint8_t {
  none,
  bias_grad,        // bias_grad[j] = sum over k of op(B)[k, j]; overwritten, not added
  gelu_aux,         // aux = D; D = gelu(D)
  gelu_aux_bias,    // aux = D + bias[i]; D = gelu(D + bias[i])
  dgelu,            // D = D * gelu'(aux)
  dgelu_bias_grad,  // the same, and bias_grad[i] = sum over j of D[i, j]
};

constexpr bool has_aux(Epilogue e) { return e >= Epilogue::gelu_aux; }
constexpr bool has_vector(Epilogue e) {
  return e == Epilogue::bias_grad || e == Epilogue::gelu_aux_bias || e == Epilogue::dgelu_bias_grad;
}

// D[m, n] = op(A)[m, k] op(B)[k, n], or D += with `accumulate`. Sums are FP32. All addresses are on the device.
struct Gemm {
  int64_t m, n, k;
  bool transpose_a, transpose_b;  // A is stored as [k, m], B as [n, k]
  DType inputs;                   // of A and B
  DType output;                   // of D, vector and aux
  const void *a, *b;
  void* d;
  int64_t lda, ldb, ldd;  // elements from a column to the next
  bool accumulate = false;
  Epilogue epilogue = Epilogue::none;
  void* vector = nullptr;  // bias (read) or its gradient (written)
  void* aux = nullptr;     // [m, n], the input of GELU: written by gelu_*, read by dgelu*
  int64_t ldaux = 0;
};

// A row-major matrix; ld: elements from a row to the next.
struct Rows {
  const void* data;
  int64_t ld;
};
struct MutableRows {
  void* data;
  int64_t ld;
};

// A linear layer: x[rows, in], weight[out, in], y[rows, out]. A row-major matrix is its transpose in column-major
// terms.
struct LinearShape {
  int64_t rows, in, out;
  DType inputs, output;
};

// y = x weight^T. A bias is one value per row of D.
inline Gemm linear_forward(const LinearShape& s, Rows x, Rows weight, MutableRows y) {
  return {s.out, s.rows, s.in, true, false, s.inputs, s.output, weight.data, x.data, y.data, weight.ld, x.ld, y.ld};
}

// dx = dy weight. A bias gradient of the layer before is one value per row of D.
inline Gemm linear_input_grad(const LinearShape& s, Rows dy, Rows weight, MutableRows dx) {
  return {s.in,        s.rows,  s.out,   false,     false, s.inputs, s.output,
          weight.data, dy.data, dx.data, weight.ld, dy.ld, dx.ld};
}

// dweight = dy^T x. B is dy, so the bias gradient is one value per column of D.
inline Gemm linear_weight_grad(const LinearShape& s, Rows dy, Rows x, MutableRows dweight) {
  return {s.in, s.out, s.rows, false, true, s.inputs, s.output, x.data, dy.data, dweight.data, x.ld, dy.ld, dweight.ld};
}

}  // namespace fusedamp
