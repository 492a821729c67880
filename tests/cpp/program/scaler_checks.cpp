// Checks of GradScaler that have no counterpart in Python: lifetimes, moves, archives, modes, and what a step calls.
#include <ATen/record_function.h>
#include <fusedamp/source/overflow_log.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <sstream>

#include "expect.h"
#include "program.h"

using fusedamp::GradScaler;
using fusedamp::GradScalerOptions;
using fusedamp::optim::AdamW;
using fusedamp::optim::AdamWOptions;

namespace {

std::vector<Tensor> params(int64_t n, at::ScalarType dtype = at::kHalf) {
  std::vector<Tensor> made;
  for (int64_t i = 0; i < n; ++i) made.push_back(at::full({16}, 1.0 + i).to(dtype).requires_grad_());
  return made;
}

void set_grads(const std::vector<Tensor>& params, double value = 64.0) {
  for (const Tensor& param : params) param.mutable_grad() = at::full(param.sizes(), value, param.options()).detach();
}

void spoil(const Tensor& param, double value = NAN) { param.grad()[0].fill_(value); }

// Each op that torch dispatches, and how often.
std::map<std::string, int> called;
std::unique_ptr<at::ObserverContext> note(const at::RecordFunction& function) {
  ++called[function.name()];
  return nullptr;
}

void never_waits() {
  const auto p = params(3);
  AdamW optimizer(p, AdamWOptions(0.01));
  GradScaler scaler(GradScalerOptions().hysteresis(2));
  scaler.scale(at::ones({}));
  const auto iterate = [&](int k) {
    set_grads(p);
    if (k % 5 == 0) spoil(p[1]);
    called.clear();
    if (k % 2) scaler.clip_grad_norm_(optimizer, 1.0);
    scaler.step(optimizer);
    scaler.update();
  };
  iterate(0);
  const auto handle = at::addGlobalCallback(at::RecordFunctionCallback(note).scopes({at::RecordScope::FUNCTION}));
  for (int k = 1; k < 300; ++k) {  // the scale is read at the floor in some of them
    iterate(k);
    EXPECT(!called.count("aten::item") && !called.count("aten::_local_scalar_dense"));
    if (k != 13) continue;
    int fusedamps = 0;
    for (const auto& [name, times] : called) {
      if (name.rfind("fusedamp::", 0) == 0) fusedamps += times;
      EXPECT(name.rfind("fusedamp::", 0) == 0 || name.rfind("aten::empty", 0) == 0 || name == "aten::new_empty");
    }
    EXPECT(fusedamps == 3);
  }
  called.clear();
  set_grads(p);
  scaler.clip_grad_norm_(optimizer, 1.0);
  scaler.clip_grad_norm_(optimizer, 0.5, 1.0);
  scaler.step(optimizer);
  scaler.update();
  scaler.last_step_skipped();
  EXPECT(!called.count("aten::item") && !called.count("aten::_local_scalar_dense"));
  at::removeCallback(handle);
}

void in_inference_mode() {
  const auto p = params(3);
  AdamW optimizer(p, AdamWOptions(0.01));
  GradScaler scaler(GradScalerOptions().policy("headroom"));
  {
    const c10::InferenceMode mode;
    scaler.scale(at::ones({}));
    set_grads(p);
    for (const Tensor& param : p) param.mutable_grad() = param.grad().clone();
    scaler.clip_grad_norm_(optimizer, 1.0);
    scaler.clip_grad_norm_(optimizer, 0.5, 1.0);
    scaler.step(optimizer);
    scaler.update();
  }
  set_grads(p);
  scaler.clip_grad_norm_(optimizer, 1.0);
  scaler.step(optimizer);
  scaler.update();
  scaler.update(4.0);
  EXPECT(scaler.get_scale() == 4.0);
  {
    const c10::InferenceMode mode;
    set_grads(p);
    spoil(p[0]);
    scaler.unscale_(optimizer);
    scaler.step(optimizer);
    scaler.update();
    EXPECT(scaler.overflow_report().overflows.at(0).nan == 1);
  }
  EXPECT(scaler.scale((p[0] * 2).sum()).requires_grad());
}

void builds_no_graph() {
  const auto p = params(2, at::kFloat);
  AdamW optimizer(p, AdamWOptions(0.01));
  GradScaler scaler;
  scaler.scale(at::ones({}));
  for (const bool unscale : {false, true}) {
    for (const Tensor& param : p) param.mutable_grad() = (param * param * 65536.0);  // as with create_graph
    const int64_t version = p[0].grad()._version();
    const Tensor norm = scaler.clip_grad_norm_(optimizer, 1.0);
    EXPECT(!norm.requires_grad());
    EXPECT(p[0].grad()._version() == version);
    if (unscale) scaler.unscale_(optimizer);
    EXPECT(!unscale || p[0].grad()._version() > version);
    EXPECT(p[0].grad().requires_grad());
    scaler.step(optimizer);
    scaler.update();
    EXPECT(!scaler.last_step_skipped().requires_grad());
    EXPECT(p[0].is_leaf());
  }
}

void moves() {
  const auto p = params(2);
  auto optimizer = std::make_unique<AdamW>(p, AdamWOptions(0.01));
  GradScaler scaler;
  scaler.scale(at::ones({}));
  set_grads(p);
  spoil(p[1], INFINITY);
  scaler.unscale_(*optimizer);
  AdamW moved(std::move(*optimizer));
  optimizer.reset();
  EXPECT(error_of([&] { scaler.unscale_(moved); }) ==
         "unscale_() has already been called on this optimizer since the last update().");
  scaler.step(moved);
  scaler.update();
  EXPECT(scaler.overflow_report(moved).step == 1);
  EXPECT(scaler.overflow_report().overflows.at(0).parameter == "AdamW group 0 parameter 1");
  GradScaler other = std::move(scaler);
  EXPECT(other.get_scale() == 32768.0 && other.overflow_report().step == 1);
  const std::string text =
      "[GradScaler] was moved to another one; expected a scaler with its scale. Use the one that has it.";
  EXPECT(error_of([&] { scaler.scale(at::ones({})); }) == text);
  EXPECT(error_of([&] { scaler.step(moved); }) == text);
  EXPECT(error_of([&] { scaler.load_state_dict(other.state_dict()); }) == text);
  set_grads(p);
  other.step(moved);
  other.update();
  EXPECT(!other.last_step_skipped().item<bool>());
}

// A new optimizer in the place of an old one is another one; of those that are gone nothing is reported.
template <class Optimizer, class Options>
void lifetimes_of() {
  GradScaler scaler;
  scaler.scale(at::ones({}));
  for (int i = 0; i < 3; ++i) {
    const auto p = params(2);
    Optimizer optimizer(p, Options(0.01));
    set_grads(p);
    spoil(p[0]);
    scaler.unscale_(optimizer);
    scaler.step(optimizer);
    if (i < 2) scaler.update();
    EXPECT(scaler.overflow_report(optimizer).step == 1 && scaler.overflow_report(optimizer).overflows.size() == 1);
  }
  scaler.update();  // by the flag of an optimizer that is gone
  EXPECT(scaler.get_scale() == 8192.0);
  EXPECT(!scaler.overflow_report());
}
// Also within an iteration.
void in_the_same_place() {
  const auto p = params(2);
  GradScaler scaler;
  scaler.scale(at::ones({}));
  for (int i = 0; i < 3; ++i) {
    AdamW optimizer(p, AdamWOptions(0.01));
    set_grads(p);
    EXPECT(error_of([&] { scaler.unscale_(optimizer); }).empty());
  }
}
void lifetimes() {
  in_the_same_place();
  lifetimes_of<AdamW, AdamWOptions>();
  lifetimes_of<torch::optim::SGD, torch::optim::SGDOptions>();
}

// Its gradients are not unscaled twice.
template <class Optimizer, class Options>
void replaces_its_parameter() {
  GradScaler scaler(GradScalerOptions().init_scale(4));
  scaler.scale(at::ones({}));
  Optimizer optimizer(params(1, at::kFloat), Options(0.5));
  set_grads(optimizer.param_groups()[0].params());
  scaler.unscale_(optimizer);
  optimizer.param_groups()[0].params()[0] = params(1, at::kFloat)[0];
  set_grads(optimizer.param_groups()[0].params(), 2.0);
  scaler.step(optimizer);
  EXPECT(optimizer.param_groups()[0].params()[0].grad()[0].template item<double>() == 2.0);
}
void replaced_parameters() {
  replaces_its_parameter<AdamW, AdamWOptions>();
  replaces_its_parameter<torch::optim::SGD, torch::optim::SGDOptions>();
}

struct Mine : AdamW {
  using AdamW::Optimizer;
};
struct Other : torch::optim::SGD {
  using SGD::SGD;
};

void names() {
  const auto p = params(1);
  Mine mine(p, AdamWOptions(0.01));
  Other other(p, torch::optim::SGDOptions(0.01));
  for (torch::optim::Optimizer* optimizer :
       {static_cast<torch::optim::Optimizer*>(&mine), static_cast<torch::optim::Optimizer*>(&other)}) {
    GradScaler scaler;
    scaler.scale(at::ones({}));
    set_grads(p);
    spoil(p[0]);
    scaler.step(*optimizer);
    const std::string name = optimizer == &mine ? "Mine" : "Other";
    EXPECT(scaler.overflow_report().str() == "step 1 was skipped:\n  " + name + " group 0 parameter 0 [16]: 1 NaN");
  }
  EXPECT(!fusedamp::OverflowReport() && fusedamp::OverflowReport().str() == "no overflow recorded");
}

void closures() {
  const auto p = params(2, at::kFloat);
  torch::optim::LBFGS optimizer(p);
  GradScaler scaler;
  scaler.scale(at::ones({}));
  set_grads(p);
  EXPECT(error_of([&] { scaler.step(optimizer); }).rfind("[GradScaler.step] LBFGS needs a closure", 0) == 0);
  EXPECT(p[0].grad()[0].item<double>() == 64.0);
  GradScaler off(GradScalerOptions().enabled(false));
  int calls = 0;
  const Tensor loss = off.step(optimizer, [&] { return ++calls, at::ones({}); });
  EXPECT(calls > 0 && loss.defined());
}

void archives() {
  std::stringstream file, empty;
  GradScaler scaler(GradScalerOptions().hysteresis(3).init_scale(8)), other;
  scaler.scale(at::ones({}));
  torch::save(scaler, file);
  torch::load(other, file);
  EXPECT(other.get_scale() == 8.0);
  GradScaler off(GradScalerOptions().enabled(false));
  torch::save(off, empty);
  EXPECT(error_of([&] { torch::load(other, empty); }).rfind("The source state dict is empty", 0) == 0);
  EXPECT(other.get_scale() == 8.0);
}

// What counts after the step, as on CUDA: gradients that were unscaled before.
void counts_later() {
  const at::NoGradGuard guard;
  const auto p = params(2);
  AdamW optimizer(p, AdamWOptions(0.01));
  fusedamp::detail::OverflowLog log(optimizer, at::kCPU);
  const auto step = [&](double found_inf) {
    log.next_step();
    log.record_uncounted(optimizer, at::full({}, found_inf, at::kFloat));
  };
  set_grads(p);
  spoil(p[1]);
  step(1);
  EXPECT(log.report().step == 1 && log.report().overflows.size() == 1 && log.report().overflows[0].nan == 1);
  step(0);
  EXPECT(log.report().step == 1);
  step(1);
  p[1].mutable_grad() = Tensor();
  EXPECT(log.report().str() == "step 3 was skipped:\n  by no gradient that still exists on this rank");
  set_grads(p);
  spoil(p[1]);
  step(1);
  p[0].mutable_grad() = p[0].grad() * NAN;
  EXPECT(log.report().overflows.empty());
  step(1);
  p[0].grad().mul_(2);
  EXPECT(log.report().step == 5 && log.report().overflows.empty());
}

// More sets of gradients than are remembered.
void many_sets() {
  const auto p = params(20);
  AdamW optimizer(p, AdamWOptions(0.01));
  GradScaler scaler;
  scaler.scale(at::ones({}));
  for (int64_t i = 0; i < 20; ++i) {
    set_grads(p);
    for (int64_t j = 0; j < i; ++j) p[j].mutable_grad() = Tensor();
    spoil(p[i]);
    scaler.step(optimizer);
    scaler.update();
    const auto report = scaler.overflow_report(optimizer);
    EXPECT(report.step == i + 1 && report.overflows.size() == 1);
    EXPECT(report.overflows.at(0).parameter == fusedamp::detail::text("AdamW group 0 parameter ", i));
  }
}

void arguments() {
  GradScaler scaler;
  EXPECT(error_of([&] { scaler.scale(Tensor()); }) == "outputs must be a Tensor or an iterable of Tensors");
  const auto scaled = scaler.scale({at::ones({}), at::ones({2}, at::kHalf)});
  EXPECT(scaled.size() == 2 && scaled[0].item<double>() == 65536.0 && scaled[1].scalar_type() == at::kHalf);
  EXPECT(error_of([&] { scaler.update(Tensor()); }).rfind("new_scale should be a float or a 1-element", 0) == 0);
  const std::string wanted = "; expected a number. Pass a float, or a tensor of one real.";
  const auto clip = [](const Tensor& max_norm) { fusedamp::clip_grad_norm_(at::ones({2}), max_norm); };
  EXPECT(error_of([&] { clip(Tensor()); }) == "[clip_grad_norm_] max_norm is an undefined tensor" + wanted);
  EXPECT(error_of([&] { clip(at::ones({2})); }) ==
         "[clip_grad_norm_] max_norm is a torch.float32 tensor of shape [2]" + wanted);
  EXPECT(error_of([&] { clip(at::ones({}, at::kBool)); }) == "[clip_grad_norm_] max_norm is True" + wanted);
  EXPECT(error_of([] { fusedamp::clip_grad_norm_(std::vector<Tensor>{Tensor()}, 1); }) ==
         "expected param to be torch.Tensor, got an undefined tensor");
  EXPECT(fusedamp::clip_grad_norm_({at::ones({2}), at::ones({2})}, 1).item<double>() == 0.0);
  Tensor param = at::ones({3}).requires_grad_();
  param.mutable_grad() = at::full({3}, 2.0);
  EXPECT(fusedamp::clip_grad_norm_(param, at::full({1}, 4)).item<float>() == std::sqrt(12.0f));
  EXPECT(param.grad()[0].item<float>() == 2.0f);
  param = at::ones({2, 2}).requires_grad_();
  param.mutable_grad() = at::ones({2, 2}).to_sparse_csr();
  EXPECT(error_of([&] { fusedamp::clip_grad_norm_(param, 1); }) ==
         "[GradScaler] a gradient of shape [2, 2] has layout torch.sparse_csr; expected torch.strided or "
         "torch.sparse_coo. Convert it with .to_dense() or .to_sparse_coo().");
  param = at::ones({2}, at::kMeta).requires_grad_();
  param.mutable_grad() = at::ones({2}, at::kMeta);
  EXPECT(error_of([&] { fusedamp::clip_grad_norm_(param, 1); }) ==
         "[grad_stats] grads[0] is on the meta device and has no data; expected a tensor with memory. Move it with "
         ".to_empty() first");
}

struct Handler : c10::WarningHandler {
  std::vector<std::string> seen;
  void process(const c10::Warning& warning) override { seen.push_back(warning.msg()); }
};

void warns_once() {
  const auto p = params(1);
  AdamW optimizer(p, AdamWOptions(0.01));
  GradScaler scaler(GradScalerOptions().min_scale(4).init_scale(4));
  scaler.scale(at::ones({}));
  Handler handler;
  const c10::WarningUtils::WarningHandlerGuard guard(&handler);
  for (int i = 0; i < 5; ++i) {
    set_grads(p);
    spoil(p[0]);
    scaler.step(optimizer);
    scaler.update();
    EXPECT(scaler.get_scale() == 4.0);
  }
  EXPECT(handler.seen.size() == 1);
  EXPECT(handler.seen.at(0) ==
         "[GradScaler] gradients overflow with the scale at its floor (min_scale 4.0), and every such step is skipped. "
         "The loss or the model is not finite, or min_scale is too big. Latest overflow: step 1 was skipped:\n"
         "  AdamW group 0 parameter 0 [16]: 1 NaN");
}

// What does not hold of one of them, a line each.
std::string failures_of(const std::string& name) {
  static const std::map<std::string, void (*)()> all = {{"never waits", never_waits},
                                                        {"in inference mode", in_inference_mode},
                                                        {"builds no graph", builds_no_graph},
                                                        {"moves", moves},
                                                        {"lifetimes", lifetimes},
                                                        {"names", names},
                                                        {"closures", closures},
                                                        {"archives", archives},
                                                        {"counts later", counts_later},
                                                        {"replaced parameters", replaced_parameters},
                                                        {"many sets", many_sets},
                                                        {"arguments", arguments},
                                                        {"warns once", warns_once}};
  failures.clear();
  all.at(name)();
  return failures;
}

const Adds adds_checks({
    {"scaler_check", [](World& w, const Args& a) { w.seen.push_back(failures_of(a[0].toStringRef())); }},
});

}  // namespace
