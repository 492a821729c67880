// Carries out a script, one command a line, and returns what a GradScaler and its optimizers answer, in bits.
// tests/shared/scaler_script.py carries out the same commands in Python.
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <sstream>

#include "program.h"

using Words = std::vector<std::string>;

namespace {

std::ostringstream& answers() {
  static std::ostringstream all;
  return all;
}

// Reads gradients in its own step, so it gets unscaled ones.
struct Reading : fusedamp::optim::AdamW {
  using Base = fusedamp::optim::AdamW;
  using Base::Base;
  Tensor step(LossClosure closure = nullptr) override {
    const Tensor grad = param_groups()[0].params()[0].grad();
    answers() << "read " << (grad.defined() ? grad.sum().item<double>() : 0.0) << "\n";
    return Base::step(closure);
  }
};

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> kinds = {{"f16", at::kHalf},         {"bf16", at::kBFloat16},
                                                              {"f32", at::kFloat},        {"f64", at::kDouble},
                                                              {"c64", at::kComplexFloat}, {"c128", at::kComplexDouble}};
  return kinds.at(name);
}

double number(const std::string& word) { return std::stod(word); }

std::string bits(const Tensor& tensor) {
  if (!tensor.defined()) return "none";
  Tensor plain = tensor.detach();
  if (plain.is_sparse()) plain = plain.coalesce()._values();
  plain = plain.resolve_conj().resolve_neg().contiguous();
  const auto* bytes = static_cast<const unsigned char*>(plain.const_data_ptr());
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < plain.nbytes(); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  std::ostringstream text;
  text << fusedamp::detail::name_of(plain.scalar_type()) << fusedamp::detail::list_text(plain.sizes()) << " "
       << std::hex << hash;
  return text.str();
}

// Its arguments are evaluated before it prints.
void say(const std::string& what, const std::string& of) { answers() << what << " " << of << "\n"; }

struct Program {
  std::unique_ptr<fusedamp::GradScaler> scaler = std::make_unique<fusedamp::GradScaler>();
  std::vector<Tensor> params;
  std::vector<std::unique_ptr<torch::optim::Optimizer>> optimizers;
  std::map<std::string, Tensor> kept;

  torch::optim::Optimizer& optimizer(const Words& words, size_t at) {
    return *optimizers.at(words.size() > at ? std::stoul(words[at]) : 0);
  }

  static Tensor values(int64_t seed, const std::vector<int64_t>& shape) {
    Tensor made = at::empty(shape, at::kDouble);
    for (int64_t i = 0; i < made.numel(); ++i)
      made.data_ptr<double>()[i] = static_cast<double>((i * 37 + seed * 101) % 97 - 48) / 1024.0;
    return made;
  }

  void set_options(const Words& words) {
    fusedamp::GradScalerOptions o;
    for (size_t i = 1; i + 1 < words.size(); i += 2) {
      const std::string &name = words[i], &value = words[i + 1];
      if (name == "init_scale") o.init_scale(number(value));
      if (name == "growth_factor") o.growth_factor(number(value));
      if (name == "backoff_factor") o.backoff_factor(number(value));
      if (name == "growth_interval") o.growth_interval(std::stol(value));
      if (name == "enabled") o.enabled(value == "1");
      if (name == "min_scale") o.min_scale(number(value));
      if (name == "max_scale") o.max_scale(number(value));
      if (name == "hysteresis") o.hysteresis(std::stol(value));
      if (name == "hysteresis_refill") o.hysteresis_refill(value);
      if (name == "on_floor") o.on_floor(value);
      if (name == "policy") o.policy(value);
      if (name == "headroom_bits") o.headroom_bits(std::stol(value));
    }
    scaler = std::make_unique<fusedamp::GradScaler>(o);
  }

  // params f16 3,4 f32 5: new parameters, which the next optimizers share out.
  void make_params(const Words& words) {
    params.clear();
    for (size_t i = 1; i + 1 < words.size(); i += 2) {
      std::vector<int64_t> shape;
      std::istringstream sizes(words[i + 1]);
      for (std::string size; std::getline(sizes, size, ',');)
        if (size != "-") shape.push_back(std::stol(size));
      params.push_back(values(static_cast<int64_t>(i), shape).to(dtype_of(words[i])).requires_grad_());
    }
  }

  // optimizer adamw 0.01 0 2: of the parameters from 0 to 2.
  void make_optimizer(const Words& words) {
    const double lr = number(words[2]);
    const std::vector<Tensor> mine(params.begin() + std::stol(words[3]), params.begin() + std::stol(words[4]));
    if (words[1] == "adamw")
      optimizers.push_back(
          std::make_unique<fusedamp::optim::AdamW>(mine, fusedamp::optim::AdamWOptions(lr).weight_decay(0.125)));
    if (words[1] == "fused_sgd")
      optimizers.push_back(std::make_unique<fusedamp::optim::SGD>(mine, fusedamp::optim::SGDOptions(lr).momentum(0.5)));
    if (words[1] == "reading")
      optimizers.push_back(std::make_unique<Reading>(mine, fusedamp::optim::AdamWOptions(lr).weight_decay(0.125)));
    if (words[1] == "sgd") optimizers.push_back(std::make_unique<torch::optim::SGD>(mine, lr));
    if (words[1] == "adam")
      optimizers.push_back(std::make_unique<torch::optim::Adam>(mine, torch::optim::AdamOptions(lr)));
  }

  // grads 3 1.5: those of step 3, times 1.5 and the scale.
  void set_grads(const Words& words) {
    const double factor = (words.size() > 2 ? number(words[2]) : 1.0) * scaler->get_scale();
    for (size_t i = 0; i < params.size(); ++i) {
      const auto seed = std::stol(words[1]) * 7 + static_cast<int64_t>(i) + 3;
      const Tensor grad = (values(seed, params[i].sizes().vec()) * factor).to(params[i].scalar_type());
      params[i].mutable_grad() = grad.is_complex() ? grad * c10::complex<double>(1, -0.5) : grad;
    }
  }

  // grad 0 sparse: the same values in another form.
  void change_grad(const Words& words) {
    at::NoGradGuard guard;
    Tensor& param = params.at(std::stoul(words[1]));
    Tensor grad = param.grad();
    const std::string& how = words[2];
    if (how == "none") param.mutable_grad() = Tensor();
    if (how == "put") grad.view(-1)[std::stol(words[3])].fill_(number(words[4]));
    if (how == "times") grad.mul_(number(words[3]));
    if (how == "double") param.mutable_grad() = grad * 2;
    if (how == "clone") param.mutable_grad() = grad.clone();
    if (how == "sparse") {
      const Tensor rows = at::tensor({0, 1, 1}, at::kLong).unsqueeze(0);
      param.mutable_grad() = at::sparse_coo_tensor(rows, grad.slice(0, 0, 3).clone(), grad.sizes());
    }
    if (how == "csr") param.mutable_grad() = grad.to_sparse_csr();
    if (how == "expanded") param.mutable_grad() = grad.slice(0, 0, 1).clone().expand(grad.sizes());
    if (how == "transposed") param.mutable_grad() = grad.t().contiguous().t();
    if (how == "gaps") {
      Tensor wide = at::zeros({grad.size(0), 2 * grad.size(1)}, grad.options());
      Tensor view = wide.slice(1, 0, 2 * grad.size(1), 2);
      param.mutable_grad() = view.copy_(grad);
    }
    if (how == "conj") param.mutable_grad() = grad.conj().resolve_conj().conj();
    if (how == "negated") param.mutable_grad() = at::_neg_view(grad.neg());
    if (how == "graph") {
      at::AutoGradMode on(true);
      param.mutable_grad() = grad.clone().requires_grad_() * 1.0;
    }
    if (how == "inference") {
      c10::InferenceMode mode;
      param.mutable_grad() = grad.clone();
    }
  }

  static std::string shown(const c10::IValue& value) {
    const auto items = fusedamp::detail::items_of(value);
    if (!items) return fusedamp::detail::repr(value);
    std::vector<int64_t> numbers;
    for (const c10::IValue& item : *items) numbers.push_back(item.toInt());
    return fusedamp::detail::list_text(numbers);
  }

  void print_state(const c10::IValue& state) {
    for (const char* name : {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker",
                             "_hysteresis_tracker", "_headroom"}) {
      const auto dict = state.toGenericDict();
      if (dict.contains(name)) answers() << "state " << name << " " << shown(dict.at(name)) << "\n";
    }
  }

  void show() {
    answers() << "scale " << fusedamp::detail::repr(scaler->get_scale()) << " skipped "
              << scaler->last_step_skipped().item<bool>() << "\n";
    for (const Tensor& param : params) answers() << "param " << bits(param) << " grad " << bits(param.grad()) << "\n";
    answers() << scaler->overflow_report() << "\n";
  }

  void run(const Words& words) {
    const std::string& what = words[0];
    if (what == "options") set_options(words);
    if (what == "params") make_params(words);
    if (what == "optimizer") make_optimizer(words);
    if (what == "drop") optimizers.clear();
    if (what == "grads") set_grads(words);
    if (what == "grad") change_grad(words);
    if (what == "loss") say("loss", bits(scaler->scale(at::full({}, number(words[1])).to(dtype_of(words[2])))));
    if (what == "unscale") scaler->unscale_(optimizer(words, 1));
    if (what == "clip")
      say("norm", bits(scaler->clip_grad_norm_(optimizer(words, 3), number(words[1]), number(words[2]))));
    if (what == "clip_by_tensor")
      say("norm", bits(scaler->clip_grad_norm_(
                      optimizer(words, 4), at::full({1}, number(words[1])).to(dtype_of(words[3])), number(words[2]))));
    if (what == "clip_params")
      say("norm", bits(fusedamp::clip_grad_norm_(params, number(words[1]), number(words[2]),
                                                 words.size() > 3 && words[3] == "finite")));
    if (what == "step") scaler->step(optimizer(words, 1));
    if (what == "closure") scaler->step(optimizer(words, 1), [] { return Tensor(); });
    if (what == "update" && words.size() == 1) scaler->update();
    if (what == "update" && words.size() == 2) scaler->update(number(words[1]));
    if (what == "update_by_tensor") scaler->update(at::full({std::stol(words[2])}, number(words[1])));
    if (what == "growth_factor") scaler->set_growth_factor(number(words[1]));
    if (what == "backoff_factor") scaler->set_backoff_factor(number(words[1]));
    if (what == "growth_interval") scaler->set_growth_interval(std::stol(words[1]));
    if (what == "show") show();
    if (what == "report") answers() << scaler->overflow_report(optimizer(words, 1)) << "\n";
    if (what == "state") print_state(scaler->state_dict());
    if (what == "move") {
      auto moved = std::make_unique<fusedamp::GradScaler>(std::move(*scaler));
      scaler = std::move(moved);
    }
    if (what == "resume") {  // through an archive of torch
      std::stringstream file;
      torch::save(*scaler, file);
      scaler = std::make_unique<fusedamp::GradScaler>();
      set_options(last_options);
      torch::load(*scaler, file);
    }
    if (what == "options") last_options = words;
    if (what == "save") fusedamp::save(scaler->state_dict(), words[1]);
    if (what == "load_scale" && scaler->is_enabled()) {
      const auto state = scaler->state_dict().toGenericDict();
      state.insert_or_assign("scale", number(words[1]));
      scaler->load_state_dict(state);
    }
    if (what == "load") scaler->load_state_dict(fusedamp::load(words[1]));
  }
  Words last_options = {"options"};
};

std::string answers_to(const std::string& commands) {
  Program program;
  answers().str("");
  answers().precision(17);
  std::istringstream lines(commands);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream in(line);
    Words words;
    for (std::string word; in >> word;) words.push_back(word);
    answers() << "> " << line << "\n";
    try {
      program.run(words);
    } catch (const c10::Error& error) {
      const char* kind = dynamic_cast<const c10::ValueError*>(&error)  ? "ValueError"
                         : dynamic_cast<const c10::TypeError*>(&error) ? "TypeError"
                                                                       : "Error";
      answers() << kind << ": " << error.what_without_backtrace() << "\n";
    }
  }
  return answers().str();
}

const Adds adds_script({
    {"scaler_script", [](World& w, const Args& a) { w.seen.push_back(answers_to(a[0].toStringRef())); }},
});

}  // namespace
