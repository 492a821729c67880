// Plain values of checkpoints: what Python calls dicts, lists, numbers and texts.
#pragma once
#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <string>
#include <vector>

#include "text.h"

namespace fusedamp::detail {

using Dict = c10::impl::GenericDict;
using List = c10::impl::GenericList;

inline Dict new_dict(const c10::TypePtr& key = c10::StringType::get()) { return Dict(key, c10::AnyType::get()); }
inline List new_list() { return List(c10::AnyType::get()); }

inline std::optional<c10::IValue> find(const Dict& dict, const c10::IValue& key) {
  const auto found = dict.find(key);
  return found == dict.end() ? std::nullopt : std::optional<c10::IValue>(found->value());
}

inline bool is_number(const c10::IValue& value) { return value.isDouble() || value.isInt() || value.isBool(); }
inline double number_of(const c10::IValue& value) {
  return value.isDouble() ? value.toDouble() : value.isInt() ? static_cast<double>(value.toInt()) : value.toBool();
}

// A value as Python's repr() writes it; of a tensor, what it is.
inline std::string repr(const c10::IValue& value);

// Several, with commas.
template <class List>
std::string reprs(const List& values) {
  std::string all;
  for (const c10::IValue& value : values) all += (all.empty() ? "" : ", ") + repr(value);
  return all;
}

inline std::string repr(const c10::IValue& value) {
  if (value.isNone()) return "None";
  if (value.isBool()) return repr(value.toBool());
  if (value.isInt()) return repr(value.toInt());
  if (value.isDouble()) return repr(value.toDouble());
  if (value.isString()) return repr(value.toStringRef());
  if (value.isTensor())
    return text("a ", torch_name(value.toTensor()), " tensor of shape ", list_text(value.toTensor().sizes()));
  if (value.isList()) return "[" + reprs(value.toListRef()) + "]";
  if (value.isTuple())
    return "(" + reprs(value.toTupleRef().elements().vec()) + (value.toTupleRef().size() == 1 ? ",)" : ")");
  if (!value.isGenericDict()) return "a " + value.tagKind();
  std::vector<std::string> items;
  for (const auto& item : value.toGenericDict()) items.push_back(repr(item.key()) + ": " + repr(item.value()));
  const std::string all = list_text(items);
  return "{" + all.substr(1, all.size() - 2) + "}";
}

// The items of a list or tuple, of whatever type; none for other values.
inline std::optional<std::vector<c10::IValue>> items_of(const c10::IValue& value) {
  if (value.isTuple()) return value.toTupleRef().elements().vec();
  if (!value.isList()) return std::nullopt;
  std::vector<c10::IValue> items;
  for (const c10::IValue& item : value.toList()) items.push_back(item);
  return items;
}

// Texts as Python writes a list of them.
inline std::string texts(const std::vector<std::string>& names) {
  std::vector<std::string> quoted;
  for (const auto& name : names) quoted.push_back(repr(name));
  return list_text(quoted);
}

}  // namespace fusedamp::detail
