// Runs a gradient check or a step with or without counts, for callgrind: the difference between two numbers of rounds
// is what one costs. usage: pass_instructions check|step f16|bf16 plain|not-due|due rounds elements, or
// pass_instructions split-bf16|split-int8 bf16 plain rounds elements, for a step with such masters and states
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/engine/cpu/engine.h"
#include "../../csrc/math/bins.h"
#include "../../csrc/math/rounding.h"

const fusedamp::cpu::Kernels& fusedamp::cpu::kernels() { return kKernels_avx2; }

namespace {

using namespace fusedamp;

void one_thread(int64_t units, const std::function<void(int64_t)>& run) {
  for (int64_t u = 0; u < units; ++u) run(u);
}

uint16_t half_of(DType dtype, float x) { return dtype == DType::f16 ? float_to_f16(x) : float_to_bf16(x); }

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const std::string pass = argv[1], kind = argv[3];
  const DType dtype = strcmp(argv[2], "f16") == 0 ? DType::f16 : DType::bf16;
  const int64_t rounds = atoll(argv[4]), n = atoll(argv[5]);
  std::vector<uint16_t> grad(n), param(n);
  std::vector<float> master(n), first(n), second(n);
  uint32_t state = 1;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;  // many binades, some zeros
    grad[i] = half_of(dtype, state % 31 ? x * x * x * 16.0f : 0.0f);
    param[i] = half_of(dtype, 1.0f + x);
    master[i] = dtype == DType::f16 ? f16_to_float(param[i]) : bf16_to_float(param[i]);
  }
  const int32_t due = kind == "due";
  double extremes[3], updates[kTallies];
  int64_t histogram[kBins];
  Numerics numerics = {extremes, histogram, &due, true, false};
  const Tally tally = {updates, &due};
  const bool counts = kind != "plain";

  float total_norm, inv_scale, clip_coef, found_inf, steps = 3.0f;
  std::vector<int16_t> remainder(n);
  std::vector<float> scales(2 * (n / kScaleBlock + 1));
  const float scale = 8.0f;
  int64_t bad[3];
  GradCheck check = {};
  check.scale = &scale;
  check.norm_type = 2.0;
  check.max_norm = 1.0;
  check.inv_scale = &inv_scale;
  check.clip_coef = &clip_coef;
  check.found_inf = &found_inf;
  check.norm = &total_norm;
  check.counts = bad;
  StepRow row = {};
  row.param = param.data();
  row.master = master.data();
  row.states[0] = first.data();
  row.states[1] = second.data();
  row.step = &steps;
  row.numel = n;
  row.grad_dtype = row.param_dtype = dtype;
  row.master_dtype = row.state_dtype = DType::f32;
  if (pass.rfind("split-", 0) == 0) {
    row.master = remainder.data();
    row.master_dtype = DType::i16;
    row.state_dtype = pass == "split-int8" ? DType::i8 : DType::bf16;
    row.scales[0] = scales.data();
    row.scales[1] = scales.data() + scales.size() / 2;
  }
  StepGroup group = {};
  const double hyper[] = {0.9, 0.999, 1e-8, 0.01};
  std::copy_n(hyper, 4, group.hyper);
  group.lr = 1e-3;
  group.count = 1;
  group.rule = kAdamW;
  void* grads = grad.data();
  for (int64_t round = 0; round < rounds; ++round) {
    if (pass == "check") {
      cpu::check_grads({{grad.data(), n, dtype}}, check, nullptr, counts ? numerics : Numerics{}, one_thread);
    } else {
      cpu::step({&row, &grads, 1}, {&group, 1}, {}, {}, counts ? tally : Tally{}, one_thread);
    }
  }
  return 0;
}
