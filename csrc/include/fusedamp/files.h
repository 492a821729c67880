// Files that C++ and Python share.
#pragma once
#include <ATen/core/ivalue.h>
#include <c10/core/Device.h>

#include <optional>
#include <string>

namespace fusedamp {

// Writes a value, such as a state dict, into a file that Python's torch.load(path) reads with weights_only=True:
// tensors, numbers, texts, dicts, lists, tuples and None. The file appears whole, or not at all.
void save(const c10::IValue& value, const std::string& path);

// Reads a file of save(), or of Python's torch.save() that holds such values; an OrderedDict, as of model.state_dict(),
// only as dict(model.state_dict()). device: where tensors go; by default where they were.
c10::IValue load(const std::string& path, std::optional<c10::Device> device = std::nullopt);

}  // namespace fusedamp
