// Files that C++ and Python share.
#pragma once
#include <ATen/core/ivalue.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import_read.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <torch/csrc/jit/serialization/storage_context.h>
#include <torch/csrc/jit/serialization/unpickler.h>

#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "text.h"

namespace fusedamp {
namespace detail {

// The storage of `t`, as bytes.
inline at::Tensor bytes_of(const at::Tensor& t) {
  at::Tensor bytes = at::empty({0}, t.options().dtype(at::kByte).requires_grad(false));
  return bytes.set_(t.storage(), 0, {static_cast<int64_t>(t.storage().nbytes())}, {1});
}

}  // namespace detail

// Writes a value, such as a state dict, into a file that Python's torch.load(path) reads with weights_only=True:
// tensors, numbers, texts, dicts, lists, tuples and None. The file appears whole, or not at all.
inline void save(const c10::IValue& value, const std::string& path) {
  std::string data;
  // torch::pickle_save tags lists and dicts with types, which weights_only=True rejects.
  torch::jit::Pickler pickler([&](const char* bytes, size_t size) { data.append(bytes, size); }, nullptr, nullptr,
                              nullptr, nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(value);
  pickler.stop();
  const std::string part = path + ".part";
  try {
    caffe2::serialize::PyTorchStreamWriter file(part);
    file.writeRecord("data.pkl", data.data(), data.size());
    size_t number = 0;
    for (const at::Tensor& tensor : pickler.tensorData()) {
      // The whole storage: a tensor may be a view, and others may share it.
      const at::Tensor bytes = detail::bytes_of(tensor).cpu();
      file.writeRecord("data/" + std::to_string(number++), bytes.data_ptr(), bytes.nbytes());
    }
    file.writeEndOfFile();
  } catch (...) {
    std::remove(part.c_str());
    throw;
  }
  if (std::rename(part.c_str(), path.c_str()) != 0) {
    std::remove(part.c_str());
    detail::refuse(detail::text("[save] ", path,
                                " could not be written; expected a path in a folder that exists and "
                                "may be written."));
  }
}

// Reads a file of save(), or of Python's torch.save() that holds such values; an OrderedDict, as of model.state_dict(),
// only as dict(model.state_dict()). device: where tensors go; by default where they were.
inline c10::IValue load(const std::string& path, std::optional<c10::Device> device = std::nullopt) {
  caffe2::serialize::PyTorchStreamReader file(path);
  // With a context, tensors that shared their storage do so again.
  return torch::jit::readArchiveAndTensors("data", "", "data/", std::nullopt, std::nullopt, device, file,
                                           torch::jit::Unpickler::defaultTypeParser,
                                           std::make_shared<torch::jit::DeserializationStorageContext>());
}

}  // namespace fusedamp
