// The element types of tensors: arithmetic types, and storage types (i8, u8: quantized values of a state with block
// scales; i16: the remainder of a split master).
#pragma once
#include <stdint.h>

namespace fusedamp {

enum class DType : uint8_t { f16, bf16, f32, f64, i8, u8, i16 };

constexpr bool is_8bit(DType t) { return t == DType::i8 || t == DType::u8; }
constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : is_8bit(t) ? 1 : 2; }
constexpr bool is_16bit(DType t) { return t == DType::f16 || t == DType::bf16; }

}  // namespace fusedamp
