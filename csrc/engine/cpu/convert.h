// Converts blocks of any element type to and from blocks of float or double. Uses hardware conversions for FP16 if the
// target has them; the rest is plain code that the compiler vectorizes. Results are bitwise equal on every target.
#pragma once
#include "../../include/fusedamp/rows.h"
#include "../../math/rounding.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

FUSEDAMP_FN void widen_f16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#endif
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = f16_to_float(from[i]);
}

FUSEDAMP_FN void narrow_f16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#endif
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; ++i) to[i] = float_to_f16(from[i]);
}

// Stochastic rounding. For normal halves: add random bits, then truncate. If a result is not normal, or is the largest
// half (to which larger values truncate), its vector takes the exact path. (The least normal half is correct even from
// below, where the exact path rounds up with at least the same probability.)
FUSEDAMP_FN void narrow_f16(const float* from, uint16_t* to, int64_t n, const uint16_t* random) {
  const auto exactly = [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) to[i] = float_to_f16(from[i], random[i]);
  };
  int64_t i = 0;
#if defined(__F16C__) && defined(__AVX2__)
  constexpr int kCut = _MM_FROUND_TO_ZERO;
  constexpr short kMagnitude = 0x7fff, kLeast = 0x0400, kNormals = 0x7bff - kLeast;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(random + i));
    const __m512i dither = _mm512_srli_epi32(_mm512_cvtepu16_epi32(halves), 3);
    const __m512i up = _mm512_add_epi32(_mm512_loadu_si512(from + i), dither);
    const __m256i cut = _mm512_cvtps_ph(_mm512_castsi512_ps(up), kCut);
    const __m256i above =
        _mm256_sub_epi16(_mm256_and_si256(cut, _mm256_set1_epi16(kMagnitude)), _mm256_set1_epi16(kLeast));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), cut);
    if (_mm256_cmpge_epu16_mask(above, _mm256_set1_epi16(kNormals))) exactly(i, i + 16);
  }
#else
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(random + i));
    const __m256i dither = _mm256_srli_epi32(_mm256_cvtepu16_epi32(halves), 3);
    const __m256i up = _mm256_add_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)), dither);
    const __m128i cut = _mm256_cvtps_ph(_mm256_castsi256_ps(up), kCut);
    const __m128i above = _mm_sub_epi16(_mm_and_si128(cut, _mm_set1_epi16(kMagnitude)), _mm_set1_epi16(kLeast));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), cut);
    const __m128i normal =
        _mm_cmpeq_epi16(_mm_max_epu16(above, _mm_set1_epi16(kNormals - 1)), _mm_set1_epi16(kNormals - 1));
    if (_mm_movemask_epi8(normal) != 0xffff) exactly(i, i + 8);
  }
#endif
#endif
  exactly(i, n);
}

FUSEDAMP_FN void widen_bf16(const uint16_t* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(from[i]);
}

FUSEDAMP_FN void narrow_bf16(const float* from, uint16_t* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(from[i]);
}

// True if narrowing gives different bits for any element.
FUSEDAMP_FN bool narrows_otherwise_f16(const float* from, const uint16_t* to, int64_t n) {
  int64_t i = 0;
  uint32_t differ = 0;
#if defined(__F16C__)
  __m128i bits = _mm_setzero_si128();
#if defined(__AVX512F__)
  __m256i wide_bits = _mm256_setzero_si256();
  for (; i + 16 <= n; i += 16) {
    const __m256i expected = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to + i));
    const __m256i rounded = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0);
    wide_bits = _mm256_or_si256(wide_bits, _mm256_xor_si256(expected, rounded));
  }
  bits = _mm_or_si128(_mm256_castsi256_si128(wide_bits), _mm256_extracti128_si256(wide_bits, 1));
#endif
  for (; i + 8 <= n; i += 8) {
    const __m128i expected = _mm_loadu_si128(reinterpret_cast<const __m128i*>(to + i));
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0);
    bits = _mm_or_si128(bits, _mm_xor_si128(expected, rounded));
  }
  differ = !_mm_testz_si128(bits, bits);
#endif
  for (; i < n; ++i) differ |= float_to_f16(from[i]) ^ to[i];
  return differ != 0;
}

FUSEDAMP_FN bool narrows_otherwise_bf16(const float* from, const uint16_t* to, int64_t n) {
  uint32_t differ = 0;
#pragma omp simd reduction(| : differ)
  for (int64_t i = 0; i < n; ++i) differ |= static_cast<uint32_t>(float_to_bf16(from[i]) ^ to[i]);
  return differ != 0;
}

template <class To, class From>
FUSEDAMP_FN void cast(const From* from, To* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// 16-bit elements, FP16 or BF16.
FUSEDAMP_FN void widen(DType dtype, const uint16_t* from, float* to, int64_t n) {
  dtype == DType::f16 ? widen_f16(from, to, n) : widen_bf16(from, to, n);
}
FUSEDAMP_FN void narrow(DType dtype, const float* from, uint16_t* to, int64_t n) {
  dtype == DType::f16 ? narrow_f16(from, to, n) : narrow_bf16(from, to, n);
}
FUSEDAMP_FN bool narrows_otherwise(DType dtype, const float* from, const uint16_t* to, int64_t n) {
  return dtype == DType::f16 ? narrows_otherwise_f16(from, to, n) : narrows_otherwise_bf16(from, to, n);
}

constexpr int64_t kBlock =
    128;  // elements staged through the L1 cache at a time; few, so that arithmetic overlaps with loads

FUSEDAMP_FN const void* element(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}

// Up to kBlock elements as V: in place if the type is V, else converted into `staging`.
FUSEDAMP_FN const float* load(const void* from, DType dtype, int64_t n, float* staging) {
  if (dtype == DType::f32) return static_cast<const float*>(from);
  if (dtype == DType::f64) {
    cast(static_cast<const double*>(from), staging, n);
  } else {
    widen(dtype, static_cast<const uint16_t*>(from), staging, n);
  }
  return staging;
}
FUSEDAMP_FN const double* load(const void* from, DType dtype, int64_t n, double* staging) {
  if (dtype == DType::f64) return static_cast<const double*>(from);
  alignas(64) float single[kBlock];
  cast(load(from, dtype, n, single), staging, n);
  return staging;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
