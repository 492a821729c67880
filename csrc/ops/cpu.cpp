// The ops on the CPU.
#include <algorithm>
#include <atomic>

#include "../engine/cpu/engine.h"
#include "ops.h"

namespace fusedamp {
namespace {

// One region on torch's own thread pool; each thread takes the next unit when it is done with one.
void parallel(int64_t units, const std::function<void(int64_t)>& run) {
  const int64_t threads = std::min<int64_t>(units, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t u = 0; u < units; ++u) run(u);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < units;) run(u);
  });
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  void step(const StepTable& table, const StepGroups& groups, const StepScalars& scalars, const StepLog& log,
            const Tally& tally) {
    cpu::step(table, groups, scalars, log, tally, parallel);
  }
  void measure(const StepTable& table, const StepGroups& groups, const StepScalars& scalars) {
    cpu::measure(table, groups, scalars, parallel);
  }
  void unscale(const std::vector<GradRow>& rows, const float* inv_scale, float* found_inf) {
    if (cpu::unscale(rows, *inv_scale, parallel)) *found_inf = 1.0f;
  }
  void grad_stats(const std::vector<GradRow>& rows, const float* inv_scale, double norm_type, const StatsOutputs& out,
                  const Numerics& numerics) {
    cpu::grad_stats(rows, inv_scale ? *inv_scale : 1.0f, norm_type, out, numerics, parallel);
  }
  void check_grads(const std::vector<GradRow>& rows, const GradCheck& check, double* per_tensor,
                   const Numerics& numerics) {
    cpu::check_grads(rows, check, per_tensor, numerics, parallel);
  }
  bool is_capturing() const { return false; }
  void recode(const Recoding& job) { cpu::recode(job, parallel); }
  void record(const StepRecord& record) { cpu::record(record); }
  void update_scale(const LossScaleRule& rule, float* scale, int32_t* growth_tracker, int32_t* budget,
                    const float* found_inf) {
    const LossScaleState now = {*scale, *growth_tracker, budget ? *budget : 1};
    const LossScaleState next = next_loss_scale(rule, now, !(*found_inf == 0.0f));
    *scale = next.scale;
    *growth_tracker = next.growth_tracker;
    if (budget) *budget = next.budget;
  }
  void update_scale_headroom(const HeadroomRule& rule, float* scale, HeadroomState* state, const float* found_inf,
                             const double* largest) {
    *scale = next_headroom_scale(rule, *scale, *state, !(*found_inf == 0.0f), *largest);
  }
};

std::string cpu_origin() { return origin(); }

std::string cpu_target() { return cpu::kernels().name; }

std::string step_ops() {
  return ""
#define FUSEDAMP_OP(op, Hyper, names) #op "_ "
#include "../math/optimizers.def"
      ;
}

int64_t rule_of(std::string op, int64_t states) { return rule_for(op, 1, states); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CompositeExplicitAutograd, m) {
  m.impl("_cpu_origin", TORCH_BOX(&cpu_origin));
  m.impl("cpu_target", TORCH_BOX(&cpu_target));
  m.impl("step_ops", TORCH_BOX(&step_ops));
  m.impl("_rule_of", TORCH_BOX(&rule_of));
  m.impl("_hyper_names", TORCH_BOX(&hyper_names));
}

STABLE_TORCH_LIBRARY_IMPL(fusedamp, CPU, m) { Ops<Cpu>::implement(m); }

}  // namespace fusedamp
