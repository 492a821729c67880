// Vectors of FP32 numbers and 32-bit words, one register wide, for the few loops that mix sizes of elements. The 16-bit
// lists of a step are read and written in the order in which unpacking leaves them: WordPair holds the elements of one
// register of halves, of which groups of four alternate between `low` and `high`. Arithmetic does not care, and no
// move across lanes is left.
#pragma once
#include "../../math/vocab.h"

#if defined(__AVX2__) && defined(__FMA__)
#define FUSEDAMP_WIDE
#include <immintrin.h>

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

#if defined(__AVX512BW__)
constexpr int kWideBytes = 64;
#define FUSEDAMP_MM(name) _mm512_##name
#define FUSEDAMP_SI(name) _mm512_##name##_si512
using WideRegister = __m512i;
using WideFloats = __m512;
#else
constexpr int kWideBytes = 32;
#define FUSEDAMP_MM(name) _mm256_##name
#define FUSEDAMP_SI(name) _mm256_##name##_si256
using WideRegister = __m256i;
using WideFloats = __m256;
#endif
constexpr int kWide = kWideBytes / 4;

typedef float Floats __attribute__((vector_size(kWideBytes)));
typedef uint32_t Words __attribute__((vector_size(kWideBytes)));
typedef int32_t Ints __attribute__((vector_size(kWideBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kWideBytes)));
struct WordPair {
  Words low, high;
};

FUSEDAMP_FN Words bits_of(Floats x) { return (Words)x; }
FUSEDAMP_FN Floats float_of(Words x) { return (Floats)x; }
FUSEDAMP_FN Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)FUSEDAMP_MM(fmadd_ps)((WideFloats)a, (WideFloats)b, (WideFloats)c);
}
FUSEDAMP_FN Floats sqrt(Floats x) { return (Floats)FUSEDAMP_MM(sqrt_ps)((WideFloats)x); }
FUSEDAMP_FN Words larger(Words a, Words b) { return (Words)FUSEDAMP_MM(max_epu32)((WideRegister)a, (WideRegister)b); }
FUSEDAMP_FN Floats smaller(Floats a, Floats b) { return (Floats)FUSEDAMP_MM(min_ps)((WideFloats)a, (WideFloats)b); }
FUSEDAMP_FN Floats larger(Floats a, Floats b) { return (Floats)FUSEDAMP_MM(max_ps)((WideFloats)a, (WideFloats)b); }
FUSEDAMP_FN Words larger(Words a, uint32_t b) { return larger(a, b - Words{}); }
FUSEDAMP_FN Floats converted(Words x) { return __builtin_convertvector((Ints)x, Floats); }
FUSEDAMP_FN Words truncated(Floats x) { return (Words) __builtin_convertvector(x, Ints); }
// 16 bits of a, and above them 16 of b.
FUSEDAMP_FN WordPair interleave(WideRegister a, WideRegister b) {
  return {(Words)FUSEDAMP_MM(unpacklo_epi16)(a, b), (Words)FUSEDAMP_MM(unpackhi_epi16)(a, b)};
}

// The upper or lower 16 bits of each word: the inverse of interleave().
#if defined(__AVX512BW__)
typedef int16_t Places16 __attribute__((vector_size(kWideBytes)));
FUSEDAMP_FN WideRegister picked(const WordPair& x, int16_t half) {
  Places16 places;
  for (int i = 0; i < 2 * kWide; ++i)
    places[i] = static_cast<int16_t>(i / 4 % 2 * 2 * kWide + i / 8 * 8 + i % 4 * 2 + half);
  return _mm512_permutex2var_epi16((WideRegister)x.low, (WideRegister)places, (WideRegister)x.high);
}
FUSEDAMP_FN WideRegister upper_halves(const WordPair& x) { return picked(x, 1); }
FUSEDAMP_FN WideRegister lower_halves(const WordPair& x) { return picked(x, 0); }
#else
FUSEDAMP_FN WideRegister upper_halves(const WordPair& x) {
  return _mm256_packus_epi32((WideRegister)(x.low >> 16), (WideRegister)(x.high >> 16));
}
FUSEDAMP_FN WideRegister lower_halves(const WordPair& x) {
  return _mm256_packus_epi32((WideRegister)(x.low & 0xffffu), (WideRegister)(x.high & 0xffffu));
}
#endif

FUSEDAMP_FN WideRegister no_halves() { return FUSEDAMP_SI(setzero)(); }
FUSEDAMP_FN WideRegister flipped(WideRegister halves) {
  return FUSEDAMP_SI(xor)(halves, FUSEDAMP_MM(set1_epi16)(static_cast<short>(0x8000)));
}
FUSEDAMP_FN WideRegister read_halves(const uint16_t* from) { return FUSEDAMP_SI(loadu)((const WideRegister*)from); }
FUSEDAMP_FN void write_halves(uint16_t* to, WideRegister halves) { FUSEDAMP_SI(storeu)((WideRegister*)to, halves); }

#if defined(__AVX512BW__)
FUSEDAMP_FN WideRegister read_bytes(const uint8_t* from) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
}
FUSEDAMP_FN WideRegister read_bytes(const int8_t* from) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
}
#else
FUSEDAMP_FN WideRegister read_bytes(const uint8_t* from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
}
FUSEDAMP_FN WideRegister read_bytes(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
}
#endif
// The lowest byte of each word.
FUSEDAMP_FN void write_bytes(void* to, const WordPair& x) {
#if defined(__AVX512BW__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi16_epi8(lower_halves(x)));
#else
  const WideRegister halves = lower_halves({x.low & 0xffu, x.high & 0xffu});
  const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128((__m128i*)to, packed);
#endif
}

FUSEDAMP_FN Words all(uint32_t x) { return x - Words{}; }
FUSEDAMP_FN Floats all(float x) { return x - Floats{}; }
FUSEDAMP_FN uint32_t largest_of(Words x) {
  uint32_t most = 0;
  for (int i = 0; i < kWide; ++i) most = most > x[i] ? most : x[i];
  return most;
}
FUSEDAMP_FN Words counted() {  // 0, 1, 2 ...
  Words x;
  for (int i = 0; i < kWide; ++i) x[i] = static_cast<uint32_t>(i);
  return x;
}
// In each 16 bytes those that `places` names; 0 for 128 and more.
FUSEDAMP_FN Words shuffled(Words x, Bytes places) {
  return (Words)FUSEDAMP_MM(shuffle_epi8)((WideRegister)x, (WideRegister)places);
}

// Of each word the four pairs of adjacent bytes, as a ring, from byte `turn` on.
FUSEDAMP_FN void write_rings(uint16_t* to, Words x, int turn) {
  Bytes places;
  for (int i = 0; i < kWideBytes; ++i) places[i] = static_cast<uint8_t>(i / 8 % 2 * 8 + (i % 8 / 2 + i % 2 + turn) % 4);
#if defined(__AVX512BW__)
  const WideRegister wide[] = {_mm512_cvtepu32_epi64(_mm512_castsi512_si256((WideRegister)x)),
                               _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64((WideRegister)x, 1))};
#else
  const WideRegister wide[] = {_mm256_cvtepu32_epi64(_mm256_castsi256_si128((WideRegister)x)),
                               _mm256_cvtepu32_epi64(_mm256_extracti128_si256((WideRegister)x, 1))};
#endif
  for (int half = 0; half < 2; ++half)
    write_halves(to + 2 * kWide * half, (WideRegister)shuffled((Words)wide[half], places));
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
#endif
