// AdamW in C++: an iteration of fusedamp against one of torch, on one thread. benchmarks/cpp.py builds and runs it.
//
//   cpp_step time PHASE BASELINE NUMEL TENSORS PAIRS
//   cpp_step once PHASE SIDE NUMEL TENSORS
//
// `time` prints samples of both sides, a pair per line: wall time, CPU time, and time waiting for a core, in seconds,
// ours first. `once` calls measured() once, for callgrind. PHASE: "step", or "scaler" for unscaling, clipping, step and
// scale update. BASELINE: "optim", which is torch::optim::AdamW, or "fused", at::_fused_adamw_ by hand. SIDE: a
// baseline, or "ours".
#include <ATen/Parallel.h>
#include <fusedamp/fusedamp.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>

#include <ctime>
#include <fstream>
#include <iostream>

namespace {

using Phase = std::function<void()>;
constexpr double kMaxNorm = 1e9;  // gradients keep their values: the clip coefficient is 1, and so is the scale
constexpr int kWarmUp = 4;

std::vector<at::Tensor> make_params(int64_t numel, int64_t tensors) {
  torch::manual_seed(0);
  std::vector<at::Tensor> params;
  for (int64_t i = 0; i < tensors; ++i) params.push_back(torch::randn({numel}).requires_grad_());
  for (at::Tensor& param : params) param.mutable_grad() = torch::randn({numel});
  return params;
}

std::vector<at::Tensor> gradients_of(const std::vector<at::Tensor>& params) {
  std::vector<at::Tensor> grads;
  for (const at::Tensor& param : params) grads.push_back(param.grad());
  return grads;
}

// A scaler as C++ programs write it: the host reads each overflow flag.
struct HandMadeScaler {
  at::Tensor scale = torch::ones({}), tracker = torch::zeros({}, torch::kInt), found_inf = torch::zeros({});

  template <class Clip, class Step>
  void iterate(const std::vector<at::Tensor>& params, const Clip& clip, const Step& step) {
    const auto grads = gradients_of(params);
    found_inf.zero_();
    at::_amp_foreach_non_finite_check_and_unscale_(grads, found_inf, scale.reciprocal());
    clip(grads);
    if (found_inf.item<float>() == 0) step();
    at::_amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 1'000'000'000);
  }
};

Phase ours(const std::vector<at::Tensor>& params, bool scales) {
  auto optimizer = std::make_shared<fusedamp::optim::AdamW>(params, fusedamp::optim::AdamWOptions(1e-3));
  if (!scales) return [=] { optimizer->step(); };
  auto scaler = std::make_shared<fusedamp::GradScaler>(
      fusedamp::GradScalerOptions().init_scale(1.0).growth_interval(1'000'000'000));
  scaler->scale(torch::zeros({}));
  return [=] {
    scaler->clip_grad_norm_(*optimizer, kMaxNorm);
    scaler->step(*optimizer);
    scaler->update();
  };
}

Phase optim(const std::vector<at::Tensor>& params, bool scales) {
  auto optimizer = std::make_shared<torch::optim::AdamW>(params, torch::optim::AdamWOptions(1e-3));
  if (!scales) return [=] { optimizer->step(); };
  const auto clip = [=](const std::vector<at::Tensor>&) { torch::nn::utils::clip_grad_norm_(params, kMaxNorm); };
  return [=, scaler = HandMadeScaler()]() mutable { scaler.iterate(params, clip, [=] { optimizer->step(); }); };
}

Phase fused(const std::vector<at::Tensor>& params, bool scales) {
  std::vector<at::Tensor> averages, squares, steps;
  for (const at::Tensor& param : params) {
    averages.push_back(torch::zeros_like(param));
    squares.push_back(torch::zeros_like(param));
    steps.push_back(torch::zeros({}));
  }
  const auto step = [=] {
    const torch::NoGradGuard no_grad;
    at::_foreach_add_(steps, 1);
    at::_fused_adamw_(params, gradients_of(params), averages, squares, {}, steps, 1e-3, 0.9, 0.999, 1e-2, 1e-8,
                      /*amsgrad=*/false, /*maximize=*/false);
  };
  if (!scales) return step;
  const auto clip = [](const std::vector<at::Tensor>& grads) {
    const at::Tensor norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(grads)));
    at::_foreach_mul_(grads, (kMaxNorm / (norm + 1e-6)).clamp_max(1.0));
  };
  return [=, scaler = HandMadeScaler()]() mutable { scaler.iterate(params, clip, step); };
}

Phase phase_of(const std::string& side, const std::vector<at::Tensor>& params, bool scales) {
  return side == "ours" ? ours(params, scales) : side == "optim" ? optim(params, scales) : fused(params, scales);
}

double seconds(clockid_t clock) {
  timespec now = {};
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Seconds that this thread waited for a core.
double waited() {
  double ran = 0, waited = 0;
  std::ifstream("/proc/self/schedstat") >> ran >> waited;
  return 1e-9 * waited;
}

struct Sample {
  double wall, cpu, waited;
};

Sample sample(const Phase& phase) {
  const Sample begin = {seconds(CLOCK_MONOTONIC), seconds(CLOCK_PROCESS_CPUTIME_ID), waited()};
  phase();
  const double cpu = seconds(CLOCK_PROCESS_CPUTIME_ID), wall = seconds(CLOCK_MONOTONIC);
  return {wall - begin.wall, cpu - begin.cpu, waited() - begin.waited};
}

void time_pairs(const std::string& baseline, bool scales, int64_t numel, int64_t tensors, int64_t pairs) {
  const auto mine = make_params(numel, tensors), theirs = make_params(numel, tensors);
  const Phase phases[] = {phase_of("ours", mine, scales), phase_of(baseline, theirs, scales)};
  for (int i = 0; i < kWarmUp; ++i)
    for (const Phase& phase : phases) phase();
  for (size_t i = 0; i < mine.size(); ++i)
    TORCH_CHECK(at::allclose(mine[i], theirs[i], 1e-5, 1e-6), "the sides differ in parameter ", i);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    Sample taken[2];
    for (const int64_t side : {pair % 2, 1 - pair % 2}) taken[side] = sample(phases[side]);
    for (const Sample& s : taken) std::cout << s.wall << ' ' << s.cpu << ' ' << s.waited << ' ';
    std::cout << '\n';
  }
}

}  // namespace

// A name that callgrind knows.
extern "C" __attribute__((noinline)) void measured(const Phase& phase) { phase(); }

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.size() < 5) return std::cerr << "see the first lines of cpp_step.cpp\n", 2;
  at::set_num_threads(1);
  const bool scales = words[1] == "scaler";
  const int64_t numel = std::stoll(words[3]), tensors = std::stoll(words[4]);
  if (words[0] == "time") {
    time_pairs(words[2], scales, numel, tensors, std::stoll(words.at(5)));
    return 0;
  }
  const Phase phase = phase_of(words[2], make_params(numel, tensors), scales);
  for (int i = 0; i < kWarmUp; ++i) phase();
  measured(phase);
}
