// The element types that tensors may have.
#pragma once
#include <stdint.h>

namespace fusedamp {

enum class DType : uint8_t { f16, bf16, f32, f64 };

constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
constexpr bool is_16bit(DType t) { return t == DType::f16 || t == DType::bf16; }

}  // namespace fusedamp
