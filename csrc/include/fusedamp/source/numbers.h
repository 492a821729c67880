// What is wrong with a number: of options, arguments and state dicts.
#pragma once
#include <ATen/ATen.h>

#include <limits>

#include "values.h"

namespace fusedamp::detail {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr double kFloatMax = std::numeric_limits<float>::max();

inline std::string shown(double value) { return repr(value); }
inline std::string shown(int64_t value) { return repr(value); }
inline std::string shown(const std::string& value) { return repr(value); }
inline std::string shown(const at::Tensor& value) {
  if (!value.defined()) return "an undefined tensor";
  if (value.numel() != 1 || value.is_meta())
    return text("a ", torch_name(value), " tensor of shape ", list_text(value.sizes()));
  const at::Scalar item = value.item();
  return item.isBoolean()         ? repr(item.toBool())
         : item.isFloatingPoint() ? repr(item.toDouble())
         : item.isComplex()       ? text(item.toComplexDouble())
                                  : repr(item.toLong());
}
inline std::string shown(const c10::IValue& value) { return value.isTensor() ? shown(value.toTensor()) : repr(value); }

// "str", as Python names the type.
inline std::string kind_of(const c10::IValue& value) {
  return value.isNone()          ? "NoneType"
         : value.isBool()        ? "bool"
         : value.isInt()         ? "int"
         : value.isDouble()      ? "float"
         : value.isString()      ? "str"
         : value.isTensor()      ? "Tensor"
         : value.isList()        ? "list"
         : value.isTuple()       ? "tuple"
         : value.isGenericDict() ? "dict"
                                 : value.tagKind();
}

template <class Value>
[[noreturn]] void refuse(const std::string& where, const std::string& name, const Value& got,
                         const std::string& wanted) {
  refuse_value(text(where, " ", name, " is ", shown(got), "; expected ", wanted, ". Pass such a value."));
}

template <class Value>
[[noreturn]] void refuse_kind(const std::string& where, const std::string& name, const Value& got) {
  refuse_type(
      text(where, " ", name, " is ", shown(got), "; expected a number. Pass a float, or a tensor of one real."));
}

// Refuses what is not one real. What a tensor holds is not read.
inline void need_number(const std::string& where, const std::string& name, const at::Tensor& value) {
  if (!value.defined() || value.numel() != 1 || value.scalar_type() == at::kBool || value.is_complex())
    refuse_kind(where, name, value);
}

// The entry of a state dict as a number; a tensor on a device makes the host wait.
inline double number(const std::string& where, const std::string& name, const c10::IValue& value) {
  if (value.isDouble()) return value.toDouble();
  if (value.isInt()) return static_cast<double>(value.toInt());
  if (!value.isTensor()) refuse_kind(where, name, value);
  need_number(where, name, value.toTensor());
  if (value.toTensor().is_meta()) refuse_kind(where, name, value);
  return value.toTensor().item().toDouble();
}
inline double number(const std::string&, const std::string&, double value) { return value; }
inline double number(const std::string&, const std::string&, int64_t value) { return static_cast<double>(value); }

// `value`, a whole number from `low` to `high`; `what` says what it counts.
template <class Value>
int64_t count(const std::string& where, const std::string& name, const Value& value, const std::string& what,
              int64_t low = 1, int64_t high = kInt32Max) {
  const double exact = number(where, name, value);
  if (!(low <= exact && exact <= high) || exact != std::floor(exact))
    refuse(where, name, value, text("a whole number from ", low, " to ", high, ": ", what));
  return static_cast<int64_t>(exact);
}

}  // namespace fusedamp::detail
