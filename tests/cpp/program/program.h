// What a case of the tests has: tensors, optimizers, and what was seen of them. Its commands are in the other files;
// tests/shared/cpp_twin.py carries out the same in Python.
#pragma once
#include <ATen/ATen.h>
#include <fusedamp/fusedamp.h>
#include <fusedamp/source/values.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

using at::Tensor;
using c10::IValue;
using fusedamp::detail::Dict;
using fusedamp::detail::List;

inline std::vector<IValue> items(const IValue& value) { return fusedamp::detail::items_of(value).value(); }

struct World {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::unique_ptr<torch::optim::Optimizer>> optimizers;
  List seen = fusedamp::detail::new_list();  // in the order of the commands

  torch::optim::Optimizer& any(const IValue& name) {
    const auto found = optimizers.find(name.toStringRef());
    TORCH_CHECK(found != optimizers.end(), "no optimizer ", name.toStringRef());  // its options were refused
    return *found->second;
  }
  fusedamp::optim::FusedOptimizer& fused(const IValue& name) {
    return dynamic_cast<fusedamp::optim::FusedOptimizer&>(any(name));
  }
  std::vector<Tensor> all(const IValue& names) {
    std::vector<Tensor> found;
    for (const IValue& name : items(names)) found.push_back(tensors.at(name.toStringRef()));
    return found;
  }
};

using Args = std::vector<IValue>;
using Command = std::function<void(World&, const Args&)>;

// By name. Each file adds its own.
std::map<std::string, Command>& commands();
struct Adds {
  Adds(std::map<std::string, Command> own) { commands().merge(own); }
};

// A copy with the same values and strides.
inline Tensor snapshot(const Tensor& t) {
  if (!t.defined() || t.is_sparse()) return t;
  return at::empty_strided(t.sizes(), t.strides(), t.options().requires_grad(false)).copy_(t.detach());
}
