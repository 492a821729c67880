// What a program may do that has no counterpart in Python, or that Python's tests can't reach: files on a full disk,
// locales, options in any order.
#include <sys/resource.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <csignal>
#include <filesystem>
#include <locale>

#include "expect.h"
#include "program.h"

namespace {

using namespace fusedamp::optim;

Tensor parameter(int64_t n) {
  Tensor made = at::ones({n}).requires_grad_();
  made.mutable_grad() = at::ones({n});
  return made;
}

size_t files_in(const std::string& folder) {
  return std::distance(std::filesystem::directory_iterator(folder), std::filesystem::directory_iterator());
}

// Files may have 100,000 bytes, as on a disk that is full then. Buffers may hold all of what is too much.
void full_disk(const std::string& folder) {
  const std::string path = folder + "/state.pt";
  fusedamp::save(at::ones({10}), path);
  rlimit limit;
  getrlimit(RLIMIT_FSIZE, &limit);
  const rlimit less = {100000, limit.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &less);
  std::vector<std::string> errors;
  for (const int64_t n : {24800, 25000, 200000})
    errors.push_back(error_of([&] { fusedamp::save(at::ones({n}), path); }));
  setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, handler);
  for (const std::string& error : errors)
    EXPECT(error == "[save] " + path +
                        " could not be written; expected a path in a folder that exists and may be written, with space "
                        "for the file. Its error is: File too large. What was there is unchanged.");
  EXPECT(fusedamp::load(path).toTensor().numel() == 10);
  EXPECT(files_in(folder) == 1);
}

// A value that Python could not read is refused before there is a file.
void unreadable(const std::string& folder) {
  const auto error = [&](const IValue& value) {
    Dict dict = fusedamp::detail::new_dict();
    dict.insert("a", c10::ivalue::Tuple::create({1, value}));
    return error_of([&] { fusedamp::save(dict, folder + "/state.pt"); });
  };
  const std::string tensors =
      ", which Python does not read; expected a strided tensor with memory, of a dtype of torch's storages. Save it in "
      "another form.";
  for (const auto dtype : {at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kUInt16, at::kUInt64, at::kComplexHalf})
    EXPECT(error(at::empty({2}, dtype)).find(tensors) != std::string::npos);
  EXPECT(error(at::ones({2, 2}).to_sparse()) ==
         "[save] value['a'][1] is a torch.float32 tensor of shape [2, 2]" + tensors);
  EXPECT(error(at::ones({2}, at::kMeta)) == "[save] value['a'][1] is a torch.float32 tensor of shape [2]" + tensors);
  EXPECT(error(Tensor()) == "[save] value['a'][1] is an undefined tensor" + tensors);
  EXPECT(error(at::ones({2}).storage())
             .rfind("[save] value['a'][1] is a Storage, which Python does not read; expected a tensor, a number", 0) ==
         0);
  EXPECT(files_in(folder) == 0);
}

struct Commas : std::numpunct<char> {
  char do_thousands_sep() const override { return ','; }
  std::string do_grouping() const override { return "\3"; }
  char do_decimal_point() const override { return ';'; }
};

// Numbers are written as in C, whatever the program's locale.
void locale(const std::string& folder) {
  const std::locale old = std::locale::global(std::locale(std::locale(), new Commas));
  const std::string shape = error_of([] {
    const Tensor p = parameter(123456);
    p.mutable_grad() = at::ones({123456}, at::kDouble);
    AdamW({p}).step();
  });
  const std::string count = error_of([] { fusedamp::GradScaler scaler(fusedamp::GradScalerOptions().hysteresis(-1)); });
  const std::string scale = error_of([] { fusedamp::GradScaler scaler(fusedamp::GradScalerOptions().init_scale(-1)); });
  Tensor p = parameter(1234);
  AdamW optimizer({p});
  optimizer.step();
  fusedamp::save(optimizer.state_dict(), folder + "/state.pt");
  optimizer.load_state_dict(fusedamp::load(folder + "/state.pt"));
  std::locale::global(old);
  EXPECT(shape.find("of shape [123456], torch.float64") != std::string::npos);
  EXPECT(count.find("from 1 to 2147483647:") != std::string::npos);
  EXPECT(scale.find("at most 3.4028235e+38 as") != std::string::npos);
  EXPECT(optimizer.state_of(p).at("step").item<double>() == 1.0);
}

// Each field of options may be the last one of a chain.
void chains(const std::string&) {
  const std::vector<Tensor> p = {parameter(2)};
  AdamW adamw(p, AdamWOptions(0.5).weight_decay(0.0).betas({0.5, 0.5}));
  Adam adam(p, AdamOptions().amsgrad(true).eps(1e-6));
  SGD sgd(p, SGDOptions(0.5).momentum(0.5).nesterov(true));
  LAMB lamb(p, LAMBOptions().lr(0.5).adapt(false));
  Lion lion(p, LionOptions().maximize(true).betas(std::make_tuple(0.5, 0.25)));  // as torch's options take them
  EXPECT((LionOptions().betas(std::make_tuple(0.5, 0.25)).betas() == Betas(0.5, 0.25)));
  AdamWOptions options = AdamWOptions().eps(0.25);
  EXPECT(options.eps() == 0.25);
  options.eps() = 0.5;
  EXPECT(options.eps() == 0.5);
}

// An optimizer that was moved from says so; so does one of no tensor.
void moved(const std::string&) {
  AdamW old(std::vector<Tensor>{parameter(2)});
  old.step();
  AdamW optimizer(std::move(old));
  const std::string text =
      "[FusedOptimizer] was moved to another one; expected an optimizer with its groups. Use the one that has them.";
  EXPECT(error_of([&] { old.step(); }) == text);
  EXPECT(error_of([&] { old.state_dict(); }) == text);
  EXPECT(error_of([&] { old.load_state_dict(optimizer.state_dict()); }) == text);
  EXPECT(error_of([&] { old.add_param_group({std::vector<Tensor>{parameter(2)}}); }) == text);
  optimizer.step();
  EXPECT(error_of([] { AdamW({parameter(1), Tensor()}); }) ==
         "[AdamW] group 0: has an undefined tensor; expected parameters. Leave it out.");
}

// What torch::save wrote of an optimizer of torch has no state dict.
void foreign(const std::string& folder) {
  const std::vector<Tensor> p = {parameter(2)};
  torch::optim::SGD theirs(p, torch::optim::SGDOptions(0.5));
  torch::save(theirs, folder + "/theirs.pt");
  SGD ours(p);
  fusedamp::GradScaler scaler;
  EXPECT(error_of([&] { torch::load(ours, folder + "/theirs.pt"); }).rfind("[SGD.load] the archive has no state", 0) ==
         0);
  EXPECT(error_of([&] { torch::load(scaler, folder + "/theirs.pt"); }).rfind("[GradScaler.load] the archive", 0) == 0);
}

// A step that is refused leaves masters, also where the options no longer want them.
void refused(const std::string&) {
  const auto weight = [] { return at::linspace(0.1, 1.0, 7).to(at::kBFloat16).requires_grad_(true); };
  Tensor detour = weight(), straight = weight();
  AdamW one({detour}, AdamWOptions(1e-3)), two({straight}, AdamWOptions(1e-3));
  const auto step = [](AdamW& optimizer, Tensor& p) {
    p.mutable_grad() = at::linspace(-1.0, 1.0, 7).to(at::kBFloat16);
    optimizer.step();
  };
  step(one, detour);
  step(two, straight);
  auto& options = static_cast<AdamWOptions&>(one.param_groups()[0].options());
  options.master_weights("none");
  detour.mutable_grad() = detour.detach();  // its own weight
  EXPECT(!error_of([&] { one.step(); }).empty());
  options.master_weights("auto");
  step(one, detour);
  step(two, straight);
  EXPECT(at::equal(detour, straight));
  EXPECT(at::equal(one.state_of(detour).at("master"), two.state_of(straight).at("master")));
}

struct Longer : AdamWOptions {
  int more = 0;
};

// Options of a class of the program's own would lose their fields.
void longer(const std::string&) {
  const std::vector<Tensor> p = {parameter(2)};
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(p, std::make_unique<Longer>());
  EXPECT(error_of([&] { AdamW optimizer(groups); }).rfind("[AdamW] options are of the class ", 0) == 0);
}

const Adds added({{"hard_use",
                   [](World& w, const Args& a) {
                     static const std::map<std::string, void (*)(const std::string&)> all = {
                         {"full disk", full_disk}, {"unreadable", unreadable}, {"locale", locale},
                         {"chains", chains},       {"moved", moved},           {"foreign", foreign},
                         {"refused", refused},     {"longer", longer}};
                     failures.clear();
                     all.at(a[0].toStringRef())(a[1].toStringRef());
                     w.seen.push_back(failures);
                   }},
                  {"lists",  // of types
                   [](World&, const Args& a) {
                     Dict all = fusedamp::detail::new_dict();
                     all.insert("ints", std::vector<int64_t>{1, 2});
                     all.insert("floats", std::vector<double>{0.5});
                     all.insert("texts", std::vector<std::string>{"a"});
                     all.insert("tensors", std::vector<Tensor>{at::ones({2}), at::zeros({1}, at::kHalf)});
                     all.insert("nested",
                                c10::ivalue::Tuple::create({std::vector<bool>{true}, c10::complex<double>(1, 2)}));
                     fusedamp::save(all, a[0].toStringRef());
                   }},
                  {"regroup",  // the last parameter of a group becomes the first of the next
                   [](World& w, const Args& a) {
                     auto& groups = w.any(a[0]).param_groups();
                     auto &from = groups.at(0).params(), &to = groups.at(1).params();
                     to.insert(to.begin(), from.back());
                     from.pop_back();
                   }}});

}  // namespace
