// The fields of options, one after another.
#pragma once
#include "../options.h"

namespace fusedamp::optim::detail {

// Calls a function with each field.
template <class Function>
struct Each final : Visitor {
  explicit Each(Function f) : function(std::move(f)) {}
  void operator()(const char* name, double& value) override { function(name, value); }
  void operator()(const char* name, bool& value) override { function(name, value); }
  void operator()(const char* name, Betas& value) override { function(name, value); }
  void operator()(const char* name, std::string& value) override { function(name, value); }
  void operator()(const char* name, std::optional<int64_t>& value) override { function(name, value); }
  Function function;
};

template <class Function>
void for_each_field(Options& options, Function function) {
  Each<Function> each(std::move(function));
  options.each_field(each);
}

}  // namespace fusedamp::optim::detail
