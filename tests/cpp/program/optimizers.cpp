// Commands about optimizers.
#include <fusedamp/source/groups.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/schedulers/step_lr.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <fstream>
#include <sstream>

#include "program.h"

namespace {

using namespace fusedamp::optim;
using fusedamp::detail::find;
using Groups = std::vector<torch::optim::OptimizerParamGroup>;
using AnyOptions = std::unique_ptr<torch::optim::OptimizerOptions>;

// Writes options that are given by name.
struct Given {
  const Dict& given;
  void operator()(const char* name, double& value) const {
    if (const auto v = find(given, name); v && !v->isTensor()) value = fusedamp::detail::number_of(*v);
  }
  void operator()(const char* name, bool& value) const {
    if (const auto v = find(given, name)) value = v->toBool();
  }
  void operator()(const char* name, std::string& value) const {
    if (const auto v = find(given, name)) value = v->toStringRef();
  }
  void operator()(const char* name, Betas& value) const {
    if (const auto v = find(given, name)) {
      const auto pair = items(*v);
      value = {fusedamp::detail::number_of(pair.at(0)), fusedamp::detail::number_of(pair.at(1))};
    }
  }
  void operator()(const char* name, std::optional<int64_t>& value) const {
    if (const auto v = find(given, name)) value = v->isNone() ? std::nullopt : std::optional<int64_t>(v->toInt());
  }
};

struct Kind {
  std::function<AnyOptions(const Dict&)> options;
  std::function<std::unique_ptr<FusedOptimizer>(const Groups&, const torch::optim::OptimizerOptions&)> make;
  std::function<std::unique_ptr<FusedOptimizer>(FusedOptimizer&)> move;
};

template <class O>
Kind kind() {
  return {
      [](const Dict& given) {
        auto options = std::make_unique<O>();
        fusedamp::optim::detail::for_each_field(*options, Given{given});
        // As a program writes them.
        if (const auto v = find(given, "lr"); v && v->isTensor()) options->lr_tensor(v->toTensor());
        if (const auto v = find(given, "state_dtype")) options->state_dtype(v->toStringRef());
        if (const auto v = find(given, "master_weights")) options->master_weights(v->toStringRef());
        return options;
      },
      [](const Groups& groups, const torch::optim::OptimizerOptions& defaults) {
        return std::make_unique<Optimizer<O>>(groups, static_cast<const O&>(defaults));
      },
      [](FusedOptimizer& old) { return std::make_unique<Optimizer<O>>(std::move(dynamic_cast<Optimizer<O>&>(old))); }};
}

const std::map<std::string, Kind> kinds = {
    {"Adam", kind<AdamOptions>()},   {"AdamW", kind<AdamWOptions>()},      {"SGD", kind<SGDOptions>()},
    {"Lion", kind<LionOptions>()},   {"Adagrad", kind<AdagradOptions>()},  {"RMSprop", kind<RMSpropOptions>()},
    {"RAdam", kind<RAdamOptions>()}, {"NAdam", kind<NAdamOptions>()},      {"LAMB", kind<LAMBOptions>()},
    {"LARS", kind<LARSOptions>()},   {"NovoGrad", kind<NovoGradOptions>()}};

torch::optim::OptimizerParamGroup group_of(World& w, const Kind& kind, const IValue& value) {
  const auto pair = items(value);
  if (pair.at(1).isNone()) return torch::optim::OptimizerParamGroup(w.all(pair[0]));
  return {w.all(pair[0]), kind.options(pair[1].toGenericDict())};
}

// optimizer o AdamW [[names, options or None], ...] defaults
void make(World& w, const Args& a) {
  const Kind& kind = kinds.at(a[1].toStringRef());
  Groups groups;
  for (const IValue& group : items(a[2])) groups.push_back(group_of(w, kind, group));
  w.optimizers[a[0].toStringRef()] = kind.make(groups, *kind.options(a[3].toGenericDict()));
}

Options& options_at(World& w, const Args& a) {
  return static_cast<Options&>(w.any(a[0]).param_groups().at(a[1].toInt()).options());
}

std::vector<Tensor>& params_at(World& w, const Args& a) { return w.any(a[0]).param_groups().at(a[1].toInt()).params(); }

// Weights, and states by name.
void look(World& w, const Args& a) {
  for (const IValue& name : items(a[1])) {
    const Tensor& param = w.tensors.at(name.toStringRef());
    Dict found = fusedamp::detail::new_dict();
    found.insert("weight", snapshot(param));
    for (const auto& [key, value] : w.fused(a[0]).state_of(param)) found.insert(key, snapshot(value));
    w.seen.push_back(found);
  }
}

// Through an archive of torch, into another optimizer.
void archive(World& w, const Args& a) {
  std::stringstream file;
  torch::save(w.any(a[0]), file);
  torch::load(w.any(a[1]), file);
}

// All that Python declares of a class, for given options.
template <class O>
Dict described(O options) {
  Dict found = fusedamp::detail::new_dict(), defaults = fusedamp::detail::new_dict();
  fusedamp::optim::detail::for_each_field(options, fusedamp::optim::detail::Writing{defaults});
  List states = fusedamp::detail::new_list(), bounds = fusedamp::detail::new_list();
  for (size_t s = 0; s < options.states().size(); ++s) {
    const auto& spec = options.states()[s];
    states.push_back(
        c10::ivalue::Tuple::create({std::string(spec.name), spec.nonnegative, spec.required, options.first(s),
                                    spec.scalar, spec.count, spec.restarts, options.uses(s)}));
  }
  for (const auto& one : options.bounds())
    bounds.push_back(c10::ivalue::Tuple::create({std::string(one.name), one.low, one.below}));
  found.insert("name", std::string(O::kName));
  found.insert("op", options.op());
  found.insert("defaults", defaults);
  found.insert("states", states);
  found.insert("bounds", bounds);
  found.insert("sparse", options.takes_sparse());
  return found;
}

// Each class as its options are written in a program, with every one of its setters.
void classes(World& w, const Args&) {
  const auto common = [](auto options) {
    return options.lr(0.5)
        .weight_decay(0.25)
        .maximize(true)
        .master_weights("none")
        .stochastic_rounding(true)
        .rounding_seed(7);
  };
  for (const Dict& built : {
           described(AdamOptions()),
           described(AdamWOptions()),
           described(SGDOptions()),
           described(LionOptions()),
           described(AdagradOptions()),
           described(RMSpropOptions()),
           described(RAdamOptions()),
           described(NAdamOptions()),
           described(LAMBOptions()),
           described(LARSOptions()),
           described(NovoGradOptions()),
           described(common(AdamOptions().betas({0.5, 0.75}).eps(0.125).amsgrad(true).decoupled_weight_decay(true))),
           described(common(AdamWOptions().betas({0.5, 0.75}).eps(0.125).amsgrad(true).state_dtype("bf16"))),
           described(common(SGDOptions().momentum(0.75).dampening(0.125).nesterov(true).state_dtype(torch::kBFloat16))),
           described(common(LionOptions().betas({0.5, 0.75}).state_dtype("torch.bfloat16"))),
           described(common(
               AdagradOptions().lr_decay(0.5).eps(0.125).initial_accumulator_value(2.0).state_dtype(torch::kInt8))),
           described(
               common(RMSpropOptions().momentum(0.75).alpha(0.5).eps(0.125).centered(true).state_dtype(torch::kFloat))),
           described(common(RAdamOptions().betas({0.5, 0.75}).eps(0.125).decoupled_weight_decay(true))),
           described(
               common(NAdamOptions().betas({0.5, 0.75}).eps(0.125).momentum_decay(0.5).decoupled_weight_decay(true))),
           described(
               common(LAMBOptions().betas({0.5, 0.75}).eps(0.125).bias_correction(false).trust_clip(2.0).adapt(false))),
           described(
               common(LARSOptions().momentum(0.75).trust_coefficient(0.5).eps(0.125).nesterov(true).adapt(false))),
           described(common(NovoGradOptions().betas({0.5, 0.75}).eps(0.125).grad_averaging(true))),
       })
    w.seen.push_back(built);
}

const Adds added({
    {"optimizer", make},
    {"classes", classes},
    {"is_rule",
     [](World& w, const Args& a) { w.seen.push_back(fusedamp::optim::detail::is_rule(a[0].toStringRef(), a[1])); }},
    {"step", [](World& w, const Args& a) { w.any(a[0]).step(); }},
    {"look", look},
    {"options",
     [](World& w, const Args& a) {
       fusedamp::optim::detail::for_each_field(options_at(w, a), Given{a[2].toGenericDict()});
     }},
    {"set_options",
     [](World& w, const Args& a) {
       w.any(a[0])
           .param_groups()
           .at(a[1].toInt())
           .set_options(kinds.at(a[2].toStringRef()).options(a[3].toGenericDict()));
     }},
    {"lr", [](World& w, const Args& a) { options_at(w, a).set_lr(a[2].toDouble()); }},
    {"add_group",
     [](World& w, const Args& a) { w.fused(a[0]).add_param_group(group_of(w, kinds.at(w.fused(a[0]).name()), a[1])); }},
    {"move",
     [](World& w, const Args& a) {
       auto& place = w.optimizers.at(a[0].toStringRef());
       place = kinds.at(w.fused(a[0]).name()).move(w.fused(a[0]));
     }},
    {"state_dict", [](World& w, const Args& a) { w.seen.push_back(w.fused(a[0]).state_dict().deepcopy()); }},
    {"load_state_dict", [](World& w, const Args& a) { w.fused(a[0]).load_state_dict(a[1]); }},
    {"archive", archive},
    // What other code may do between two steps.
    {"replace", [](World& w, const Args& a) { params_at(w, a).at(a[2].toInt()) = w.tensors.at(a[3].toStringRef()); }},
    {"swap", [](World& w, const Args& a) { std::swap(params_at(w, a).at(0), params_at(w, a).at(1)); }},
    {"remove", [](World& w, const Args& a) { params_at(w, a).erase(params_at(w, a).begin() + a[2].toInt()); }},
    {"erase_state",
     [](World& w, const Args& a) {
       w.any(a[0]).state().erase(w.tensors.at(a[1].toStringRef()).unsafeGetTensorImpl());
     }},
    {"clear_state", [](World& w, const Args& a) { w.any(a[0]).state().clear(); }},
    {"write_state",
     [](World& w, const Args& a) {
       Tensor state = w.fused(a[0]).state_of(w.tensors.at(a[1].toStringRef())).at(a[2].toStringRef());
       state.copy_(a[3].toTensor());
     }},
    {"set_state_data",
     [](World& w, const Args& a) {
       Tensor state = w.fused(a[0]).state_of(w.tensors.at(a[1].toStringRef())).at(a[2].toStringRef());
       state.set_data(snapshot(a[3].toTensor()));
     }},
    {"step_in_inference_mode",
     [](World& w, const Args& a) {
       const c10::InferenceMode guard;
       w.any(a[0]).step();
     }},
    {"closure",
     [](World& w, const Args& a) {
       at::NoGradGuard off;  // a closure computes gradients all the same
       w.seen.push_back(snapshot(w.any(a[0]).step([&] {
         w.any(a[0]).zero_grad();
         const Tensor loss = w.tensors.at(a[1].toStringRef()).pow(2).sum();
         loss.backward();
         return loss;
       })));
     }},
    // torch's method, which knows nothing of groups with options of other classes than torch's
    {"add_group_by_base",
     [](World& w, const Args& a) { w.any(a[0]).add_param_group(group_of(w, kinds.at(w.fused(a[0]).name()), a[1])); }},
    {"options_of_another_class",
     [](World& w, const Args& a) {
       w.any(a[0]).param_groups().at(0).set_options(std::make_unique<torch::optim::AdamWOptions>(0.5));
     }},
    {"scheduler",
     [](World& w, const Args& a) {
       torch::optim::StepLR scheduler(w.any(a[0]), 2, 0.5);
       List rates = fusedamp::detail::new_list();
       for (int i = 0; i < 6; ++i) {
         scheduler.step();
         rates.push_back(w.any(a[0]).param_groups()[0].options().get_lr());
       }
       w.seen.push_back(rates);
     }},
    {"versions",
     [](World& w, const Args& a) {
       List found = fusedamp::detail::new_list();
       for (const Tensor& t : w.all(a[0])) found.push_back(static_cast<int64_t>(t._version()));
       w.seen.push_back(found);
     }},
    {"number_of_states",
     [](World& w, const Args& a) { w.seen.push_back(static_cast<int64_t>(w.any(a[0]).state().size())); }},
});

}  // namespace
