// Reads a case, a list of commands in a file, carries them out, and writes what it saw into another file. One line of
// its input is the paths of both; its answer is a line.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <iostream>

#include "program.h"

std::map<std::string, Command>& commands() {
  static std::map<std::string, Command> known;
  return known;
}

namespace {

// Parameters and gradients

Tensor changed(const Tensor& grad, const std::string& how) {
  if (how == "sparse") return grad.to_sparse(1);
  if (how == "transposed") return grad.t().contiguous().t();
  if (how == "expanded") return grad.slice(0, 0, 1).expand_as(grad);
  if (how == "gaps") return at::stack({grad, grad}, -1).select(-1, 0);
  if (how == "conj") return grad.conj().resolve_conj().conj();
  if (how == "negated") return at::_neg_view(grad.neg());
  TORCH_CHECK(false, "no such form: ", how);
}

const Adds added({
    {"param",
     [](World& w, const Args& a) {
       const Tensor made = snapshot(a[1].toTensor());
       w.tensors[a[0].toStringRef()] = made.requires_grad_(made.is_floating_point() || made.is_complex());
     }},
    {"param_view", [](World& w, const Args& a) { w.tensors[a[0].toStringRef()] = a[1].toTensor().requires_grad_(); }},
    {"meta",
     [](World& w, const Args& a) {
       w.tensors[a[0].toStringRef()] = at::empty({3}, at::device(at::kMeta)).requires_grad_();
       w.tensors[a[0].toStringRef()].mutable_grad() = at::empty({3}, at::device(at::kMeta));
     }},
    {"no_storage",
     [](World& w, const Args& a) { w.tensors.at(a[0].toStringRef()).storage().unsafeGetStorageImpl()->reset(); }},
    // elements begin to end of another
    {"part",
     [](World& w, const Args& a) {
       w.tensors[a[0].toStringRef()] =
           w.tensors.at(a[1].toStringRef()).detach().slice(0, a[2].toInt(), a[3].toInt()).requires_grad_();
     }},
    {"grads",
     [](World& w, const Args& a) {
       for (const auto& item : a[0].toGenericDict()) {
         Tensor& param = w.tensors.at(item.key().toStringRef());
         param.mutable_grad() = item.value().isNone() ? Tensor() : item.value().toTensor();
       }
     }},
    {"form",
     [](World& w, const Args& a) {
       Tensor& param = w.tensors.at(a[0].toStringRef());
       param.mutable_grad() = changed(param.grad(), a[1].toStringRef());
     }},
    // the gradient of p is the weight q, or a part of it
    {"alias",
     [](World& w, const Args& a) {
       Tensor& param = w.tensors.at(a[0].toStringRef());
       param.mutable_grad() = w.tensors.at(a[1].toStringRef()).detach().slice(0, 0, param.size(0));
     }},
    {"write",
     [](World& w, const Args& a) {
       at::NoGradGuard guard;
       w.tensors.at(a[0].toStringRef()).copy_(a[1].toTensor());
     }},
    {"set_data", [](World& w, const Args& a) { w.tensors.at(a[0].toStringRef()).set_data(snapshot(a[1].toTensor())); }},
    {"reset",
     [](World& w, const Args&) {
       w.optimizers.clear();
       w.tensors.clear();
     }},
    {"echo", [](World& w, const Args& a) { w.seen.push_back(a[0]); }},
    {"save", [](World&, const Args& a) { fusedamp::save(a[1], a[0].toStringRef()); }},
    {"load", [](World& w, const Args& a) { w.seen.push_back(fusedamp::load(a[0].toStringRef())); }},
    {"forget", [](World& w, const Args& a) { w.tensors.erase(a[0].toStringRef()); }},
    {"weights",
     [](World& w, const Args& a) {
       List found = fusedamp::detail::new_list();
       for (const Tensor& param : w.all(a[0])) found.push_back(snapshot(param));
       w.seen.push_back(found);
     }},
});

// The protocol

std::string kind_of(const c10::Error& error) {
  if (dynamic_cast<const c10::ValueError*>(&error)) return "ValueError";
  if (dynamic_cast<const c10::TypeError*>(&error)) return "TypeError";
  return "RuntimeError";
}

// An error is something that the case sees, like any other result.
void run(World& world, const Args& command) {
  const Args args(command.begin() + 1, command.end());
  const Command& body = commands().at(command[0].toStringRef());
  try {
    body(world, args);
  } catch (const c10::Error& error) {
    world.seen.push_back(kind_of(error) + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    world.seen.push_back(std::string("exception: ") + error.what());
  }
}

// Warnings are seen, too.
struct Warnings : c10::WarningHandler {
  World* world = nullptr;
  void process(const c10::Warning& warning) override { world->seen.push_back("warning: " + warning.msg()); }
};

}  // namespace

int main() {
  at::set_num_threads(1);
  Warnings warnings;
  c10::WarningUtils::set_warning_handler(&warnings);
  c10::WarningUtils::set_warnAlways(true);
  for (std::string input, output; std::getline(std::cin, input) && std::getline(std::cin, output);) {
    World world;
    warnings.world = &world;
    for (const IValue& command : items(fusedamp::load(input))) run(world, items(command));
    fusedamp::save(world.seen, output);
    std::cout << "done" << std::endl;
  }
}
