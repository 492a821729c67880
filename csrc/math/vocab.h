// Basic functions of update rules, for every value type V (float, double).
// Compiles anywhere: host compilers, nvcc, the CUDA emulation. No fast-math: a multiply-add is
// fused where and only where `fma` is written.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define FUSEDAMP_FN __host__ __device__ __forceinline__
#else
#define FUSEDAMP_FN inline __attribute__((always_inline))
#endif

// Each CPU instruction set compiles these headers into a separate namespace. Otherwise the linker could use an inline
// function's AVX-512 version for all sets, and older machines would crash.
#ifndef FUSEDAMP_TARGET
#define FUSEDAMP_TARGET portable
#endif

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

#if defined(__CUDA_ARCH__)
FUSEDAMP_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FUSEDAMP_FN double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
FUSEDAMP_FN float sqrt(float x) { return __fsqrt_rn(x); }
FUSEDAMP_FN double sqrt(double x) { return __dsqrt_rn(x); }
FUSEDAMP_FN double pow(double x, double y) { return ::pow(x, y); }
#else
FUSEDAMP_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FUSEDAMP_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
FUSEDAMP_FN float sqrt(float x) { return __builtin_sqrtf(x); }
FUSEDAMP_FN double sqrt(double x) { return __builtin_sqrt(x); }
FUSEDAMP_FN double pow(double x, double y) { return __builtin_pow(x, y); }  // the only one with device-dependent bits
#endif

template <class V>
FUSEDAMP_FN V where(bool condition, V yes, V no) {
  return condition ? yes : no;
}

// The larger one; NaN if either is NaN, as torch.maximum.
template <class V>
FUSEDAMP_FN V maximum(V a, V b) {
  return where(a >= b || a != a, a, b);
}

// 1, -1, or x itself where it is 0 or NaN.
template <class V>
FUSEDAMP_FN V sign(V x) {
  return where(x > V(0), V(1), where(x < V(0), V(-1), x));
}

// base^n for a whole number n >= 0 by repeated squaring. Only IEEE multiplications, so host and device results are
// bitwise equal, unlike those of pow().
FUSEDAMP_FN double powi(double base, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

// The same struct of coefficients with every field rounded from double to S.
template <template <class> class Coeffs, class S>
FUSEDAMP_FN Coeffs<S> round_coeffs(const Coeffs<double>& exact) {
  constexpr int n = sizeof(exact) / sizeof(double);
  static_assert(sizeof(Coeffs<S>) == n * sizeof(S), "coefficients are plain fields of one type");
  union {
    Coeffs<S> fields;
    S list[n];
  } rounded;
  const double* source = reinterpret_cast<const double*>(&exact);
  for (int i = 0; i < n; ++i) rounded.list[i] = static_cast<S>(source[i]);
  return rounded.fields;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
