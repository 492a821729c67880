// The passes over lists of tensors on CUDA. Nothing here waits for the device; everything is queued on one stream and
// may be captured in a graph. Tables that stay the same are on the device already; then a pass is one or two launches.
#pragma once
#include <functional>
#include <vector>

#include "../../math/loss_scale.h"
#include "../../math/rules.h"
#include "../table.h"

struct CUstream_st;

namespace fusedamp::cuda {

// Where a pass runs, and its memory. The caller owns all memory; the engine allocates none.
struct Device {
  CUstream_st* stream;
  int multiprocessors;
  // Device memory for the kernels that this call queues, aligned to 16 bytes, not initialised.
  std::function<void*(int64_t bytes)> scratch;
  // The address of a device copy of `table`: an earlier one with the same content, or one that `upload` fills now.
  std::function<const void*(const void* table, int64_t bytes)> resident;
};

// One step of all groups, in which the groups of one rule that follow each other share their launches. All addresses
// in the tables and scalars are on the device; the tables themselves are not, and may go when this returns.
void step(const Device& device, const StepTable& table, const StepGroups& groups, const StepScalars& scalars,
          StepLog log);

// inv_scale may be null, for 1. What is written lies on the device.
void grad_stats(const Device& device, const std::vector<GradRow>& rows, const float* inv_scale, double norm_type,
                const StatsOutputs& out);

// The same, and what follows from it, in as many launches.
void check_grads(const Device& device, const std::vector<GradRow>& rows, const GradCheck& check);

void unscale(const Device& device, const std::vector<GradRow>& rows, const float* inv_scale, float* found_inf);

// A master or state into another format.
void recode(const Device& device, const Recoding& job);

// budget may be null, for 1.
void update_scale(const Device& device, const LossScaleRule& rule, float* scale, int32_t* growth_tracker,
                  int32_t* budget, const float* found_inf);

// Copies `bytes` (a multiple of 8) to the device inside kernel parameters, so the host's copy may go at once, also
// while a graph is captured.
void upload(CUstream_st* stream, void* to, const void* from, int64_t bytes);

}  // namespace fusedamp::cuda
