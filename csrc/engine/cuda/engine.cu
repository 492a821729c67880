// Kernels of each op: one table entry per update rule, and the small kernels without a file of their own.
#include "chunks.cuh"

#include "../passes.h"

namespace fusedamp::cuda {

// Instantiated once per rule: adamw.cu, adam.cu, sgd.cu ...
template <class Rule>
void step_with(const Device& device, const StepTable& table, const StepGroups& groups, const StepScalars& scalars,
               StepLog& log, const Tally& tally, bool only_measures);
#define FUSEDAMP_RULE(op, Rule)                                                                                \
  extern template void step_with<Rule>(const Device&, const StepTable&, const StepGroups&, const StepScalars&, \
                                       StepLog&, const Tally&, bool);
#include "../../math/optimizers.def"

namespace {

// Updates the log of a step without rows; otherwise the first launch does it.
__global__ void __launch_bounds__(kBlock) log_kernel(const StepLog log, const float* found_inf) {
  keep_log(log, overflowed(found_inf), threadIdx.x, blockDim.x);
}

}  // namespace

static void run(const Device& device, const StepTable& table, const StepGroups& groups, const StepScalars& scalars,
                StepLog& log, const Tally& tally, bool only_measures) {
  using Step =
      void (*)(const Device&, const StepTable&, const StepGroups&, const StepScalars&, StepLog&, const Tally&, bool);
  static constexpr Step kSteps[] = {
#define FUSEDAMP_RULE(op, Rule) &step_with<Rule>,
#include "../../math/optimizers.def"
  };
  for_each_pass(table, groups, [&](int32_t rule, const StepTable& rows) {
    Tally of_pass = tally;
    if (tally.updates) of_pass.updates += kTallies * (rows.rows - table.rows);
    kSteps[rule](device, rows, groups, scalars, log, of_pass, only_measures);
  });
}

void measure(const Device& device, const StepTable& table, const StepGroups& groups, const StepScalars& scalars) {
  StepLog none = {};
  run(device, table, groups, scalars, none, {}, true);
}

void step(const Device& device, const StepTable& table, const StepGroups& groups, const StepScalars& scalars,
          StepLog log, const Tally& tally) {
  run(device, table, groups, scalars, log, tally, false);
  if (log.steps) launch("log", &log_kernel, 1, kBlock, device.stream, log, scalars.found_inf);
}

namespace {

__global__ void __launch_bounds__(1)
    update_scale_kernel(const LossScaleRule rule, float* scale, int32_t* growth_tracker, int32_t* budget,
                        const float* found_inf) {
  const LossScaleState now = {*scale, *growth_tracker, budget ? *budget : 1};
  const LossScaleState next = next_loss_scale(rule, now, overflowed(found_inf));
  *scale = next.scale;
  *growth_tracker = next.growth_tracker;
  if (budget) *budget = next.budget;
}

__global__ void __launch_bounds__(1)
    update_scale_headroom_kernel(const HeadroomRule rule, float* scale, HeadroomState* state, const float* found_inf,
                                 const double* largest) {
  *scale = next_headroom_scale(rule, *scale, *state, overflowed(found_inf), *largest);
}

template <int kWords>
struct Packet {
  uint64_t words[kWords];
};

template <int kWords>
__global__ void __launch_bounds__(kBlock)
    upload_kernel(const __grid_constant__ Packet<kWords> packet, uint64_t* to, int words) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < words) to[i] = packet.words[i];
}

template <int kWords>
void upload_in_packets(CUstream_st* stream, uint64_t* to, const uint64_t* from, int64_t words) {
  for (int64_t sent = 0; sent < words; sent += kWords) {
    Packet<kWords> packet;
    const int count = static_cast<int>(std::min<int64_t>(kWords, words - sent));
    memcpy(packet.words, from + sent, count * sizeof packet.words[0]);
    launch("upload", &upload_kernel<kWords>, (count + kBlock - 1) / kBlock, kBlock, stream, packet, to + sent, count);
  }
}

}  // namespace

void update_scale(const Device& device, const LossScaleRule& rule, float* scale, int32_t* growth_tracker,
                  int32_t* budget, const float* found_inf) {
  launch("update_scale", &update_scale_kernel, 1, 1, device.stream, rule, scale, growth_tracker, budget, found_inf);
}

void update_scale_headroom(const Device& device, const HeadroomRule& rule, float* scale, HeadroomState* state,
                           const float* found_inf, const double* largest) {
  launch("update_scale_headroom", &update_scale_headroom_kernel, 1, 1, device.stream, rule, scale, state, found_inf,
         largest);
}

void upload(CUstream_st* stream, void* to, const void* from, int64_t bytes) {
  const int64_t words = bytes / 8;
  auto* target = static_cast<uint64_t*>(to);
  auto* source = static_cast<const uint64_t*>(from);
  if (words <= kSmallPacketWords) {
    upload_in_packets<kSmallPacketWords>(stream, target, source, words);
  } else {
    upload_in_packets<kPacketWords>(stream, target, source, words);
  }
}

}  // namespace fusedamp::cuda
