// Files that C++ and Python share.
#include "../files.h"

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import_read.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <torch/csrc/jit/serialization/storage_context.h>
#include <torch/csrc/jit/serialization/unpickler.h>

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "values.h"

namespace fusedamp {
namespace detail {
namespace {

// The storage of `t`, as bytes.
at::Tensor bytes_of(const at::Tensor& t) {
  at::Tensor bytes = at::empty({0}, t.options().dtype(at::kByte).requires_grad(false));
  return bytes.set_(t.storage(), 0, {static_cast<int64_t>(t.storage().nbytes())}, {1});
}

// Whether Python has a name for this tensor in a file, which LibTorch's pickler does not ask.
bool is_readable(const at::Tensor& t) {
  if (!t.defined() || t.layout() != c10::kStrided || t.is_meta() || t.is_quantized() || !t.has_storage()) return false;
  const auto dtype = t.scalar_type();
  return c10::isIntegralType(dtype, /*includeBool=*/true)
             ? dtype < c10::kUInt16
             : dtype == c10::kHalf || dtype == c10::kBFloat16 || dtype == c10::kFloat || dtype == c10::kDouble ||
                   dtype == c10::kComplexFloat || dtype == c10::kComplexDouble;
}

// The same value in lists without a type: the pickler writes others by functions that weights_only=True rejects.
c10::IValue plain(const c10::IValue& value, const std::string& where) {
  if (const auto items = items_of(value)) {
    std::vector<c10::IValue> made;
    for (const c10::IValue& item : *items) made.push_back(plain(item, text(where, "[", made.size(), "]")));
    if (value.isTuple()) return c10::ivalue::Tuple::create(std::move(made));
    List list = new_list();
    for (c10::IValue& item : made) list.push_back(std::move(item));
    return list;
  }
  if (value.isGenericDict()) {
    const Dict dict = value.toGenericDict();
    Dict made(dict.keyType(), c10::AnyType::get());
    for (const auto& item : dict) made.insert(item.key(), plain(item.value(), text(where, "[", repr(item.key()), "]")));
    return made;
  }
  if (value.isTensor() && !is_readable(value.toTensor()))
    refuse_value(text(where, " is ", value.toTensor().defined() ? repr(value) : "an undefined tensor",
                      ", which Python does not read; expected a strided tensor with memory, of a dtype of torch's ",
                      "storages. Save it in another form."));
  if (!value.isTensor() && !value.isNone() && !is_number(value) && !value.isComplexDouble() && !value.isString() &&
      !value.isDevice())
    refuse_type(text(where, " is ", repr(value),
                     ", which Python does not read; expected a tensor, a number, a text, None, or a dict, list or ",
                     "tuple of such. Save it as one of these."));
  return value;
}

// A file under another name until it is complete. Writing tells of no error before the end: torch's writer of archives
// ends the program if it can't finish.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path) {
    std::random_device random;  // processes may save to one path at the same time
    part_ = text(path, ".", random(), ".part");
    note((file_ = std::fopen(part_.c_str(), "wbxe")) != nullptr);
    if (error_ != 0) fail();
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile() {
    if (file_) std::fclose(file_);
    if (!part_.empty()) std::remove(part_.c_str());
  }

  size_t write(const void* bytes, size_t size) {
    if (error_ == 0 && size > 0) note(std::fwrite(bytes, 1, size, file_) == size);
    return size;
  }
  // Gives it its name, once the disk has all of it.
  void finish() {
    if (error_ == 0) note(std::fflush(file_) == 0 && ::fsync(::fileno(file_)) == 0);
    if (error_ == 0) note(std::fclose(std::exchange(file_, nullptr)) == 0);
    if (error_ == 0) note(std::rename(part_.c_str(), path_.c_str()) == 0);
    if (error_ != 0) fail();
    part_.clear();
  }

 private:
  void note(bool done) { error_ = done ? 0 : errno != 0 ? errno : EIO; }
  [[noreturn]] void fail() const {
    refuse(text("[save] ", path_, " could not be written; expected a path in a folder that exists and may be written, ",
                "with space for the file. Its error is: ", std::strerror(error_), ". What was there is unchanged."));
  }

  std::string path_, part_;
  std::FILE* file_ = nullptr;
  int error_ = 0;
};

}  // namespace
}  // namespace detail

void save(const c10::IValue& value, const std::string& path) {
  std::string data;
  // torch::pickle_save tags lists and dicts with types, which weights_only=True rejects.
  torch::jit::Pickler pickler([&](const char* bytes, size_t size) { data.append(bytes, size); }, nullptr, nullptr,
                              nullptr, nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(detail::plain(value, "[save] value"));
  pickler.stop();
  detail::NewFile file(path);
  {
    caffe2::serialize::PyTorchStreamWriter archive(
        [&](const void* bytes, size_t size) { return file.write(bytes, size); });
    archive.writeRecord("data.pkl", data.data(), data.size());
    size_t number = 0;
    for (const at::Tensor& tensor : pickler.tensorData()) {
      // The whole storage: a tensor may be a view, and others may share it.
      const at::Tensor bytes = detail::bytes_of(tensor).cpu();
      archive.writeRecord("data/" + std::to_string(number++), bytes.data_ptr(), bytes.nbytes());
    }
    archive.writeEndOfFile();
  }
  file.finish();
}

c10::IValue load(const std::string& path, std::optional<c10::Device> device) {
  std::string problem;
  try {
    caffe2::serialize::PyTorchStreamReader file(path);
    // With a context, tensors that shared their storage do so again.
    return torch::jit::readArchiveAndTensors("data", "", "data/", std::nullopt, std::nullopt, device, file,
                                             torch::jit::Unpickler::defaultTypeParser,
                                             std::make_shared<torch::jit::DeserializationStorageContext>());
  } catch (const c10::Error& error) {
    problem = error.what_without_backtrace();
  }
  const bool is_ordered = problem.find("GenericDict") != std::string::npos;
  detail::refuse(detail::text(
      "[load] ", path, is_ordered ? " holds an OrderedDict, as of model.state_dict()" : " could not be read",
      "; expected a file of fusedamp::save or of Python's torch.save that holds tensors, numbers, texts, and dicts, ",
      "lists and tuples of them. ",
      is_ordered ? "Save dict(model.state_dict())." : "torch::load reads what torch::save has written. torch says: ",
      is_ordered ? "" : problem));
}

}  // namespace fusedamp
