// Texts of errors, written as Python writes them: fusedamp says the same in both languages.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <charconv>
#include <cmath>
#include <locale>
#include <sstream>
#include <string>

namespace fusedamp::detail {

// A float as Python's repr() writes it: the fewest digits that give the same number.
inline std::string repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::scientific).ptr;
  std::string digits(text, end);
  const size_t e = digits.find('e');
  const int exponent = std::stoi(digits.substr(e + 1));
  if (exponent < -4 || exponent >= 16) return digits;
  const std::string fixed(text, std::to_chars(text, text + sizeof text, value, std::chars_format::fixed).ptr);
  return fixed.find('.') == std::string::npos ? fixed + ".0" : fixed;
}
inline std::string repr(bool value) { return value ? "True" : "False"; }
inline std::string repr(int64_t value) { return std::to_string(value); }
inline std::string repr(const std::string& value) { return "'" + value + "'"; }

// Whatever the program's locale, a number has no commas.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream all;
  all.imbue(std::locale::classic());
  (all << ... << parts);
  return all.str();
}

// A list as Python writes it.
template <class List>
std::string list_text(const List& values) {
  std::string items;
  for (const auto& value : values) items += text(items.empty() ? "" : ", ", value);
  return "[" + items + "]";
}

// "float32"; torch.float32 without its module.
inline std::string name_of(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kHalf: return "float16";
    case c10::kBFloat16: return "bfloat16";
    case c10::kFloat: return "float32";
    case c10::kDouble: return "float64";
    case c10::kByte: return "uint8";
    case c10::kChar: return "int8";
    case c10::kShort: return "int16";
    case c10::kInt: return "int32";
    case c10::kLong: return "int64";
    case c10::kBool: return "bool";
    case c10::kComplexHalf: return "complex32";
    case c10::kComplexFloat: return "complex64";
    case c10::kComplexDouble: return "complex128";
    default: return c10::toString(dtype);
  }
}
inline std::string torch_name(const at::Tensor& t) { return "torch." + name_of(t.scalar_type()); }

[[noreturn]] inline void refuse_value(const std::string& message) {
  C10_THROW_ERROR(ValueError, message);
  __builtin_unreachable();
}
[[noreturn]] inline void refuse_type(const std::string& message) {
  C10_THROW_ERROR(TypeError, message);
  __builtin_unreachable();
}
[[noreturn]] inline void refuse(const std::string& message) {
  C10_THROW_ERROR(Error, message);
  __builtin_unreachable();
}

}  // namespace fusedamp::detail
