// Passes over lists of tensors on CUDA. Nothing here syncs; all work is queued on one stream and may be captured in a
// graph. Unchanged tables are already on the device; then a pass is one or two launches.
#pragma once
#include <functional>
#include <vector>

#include "../../math/headroom.h"
#include "../../math/loss_scale.h"
#include "../../math/rules.h"
#include "../table.h"

struct CUstream_st;

namespace fusedamp::cuda {

// Where a pass runs, and its memory. The caller owns all memory; the engine allocates none.
struct Device {
  CUstream_st* stream;
  int multiprocessors;
  // Device memory for the kernels that this call queues, aligned to 16 bytes, not initialized.
  std::function<void*(int64_t bytes)> scratch;
  // The address of a device copy of `table`: a cached one with equal content, or a new one that `upload` fills.
  std::function<const void*(const void* table, int64_t bytes)> resident;
};

// One step of all groups; consecutive groups of one rule share launches. All addresses in the tables and scalars are on
// the device; the tables are on the host and may be freed after the call.
void step(const Device& device, const StepTable& table, const StepGroups& groups, const StepScalars& scalars,
          StepLog log, const Tally& tally);

// Writes each row's `squares`: the sums over its buffers, which the caller adds up over ranks. Writes nothing if
// *scalars.found_inf is not 0, and for rules without norms.
void measure(const Device& device, const StepTable& table, const StepGroups& groups, const StepScalars& scalars);

// inv_scale may be null, for 1. Outputs are on the device.
void grad_stats(const Device& device, const std::vector<GradRow>& rows, const float* inv_scale, double norm_type,
                const StatsOutputs& out, const Numerics& numerics);

// The same, and the results derived from it, with the same number of launches. `per_tensor` as in StatsOutputs; null:
// not wanted.
void check_grads(const Device& device, const std::vector<GradRow>& rows, const GradCheck& check, double* per_tensor,
                 const Numerics& numerics);

void unscale(const Device& device, const std::vector<GradRow>& rows, const float* inv_scale, float* found_inf);

// A master or state into another format.
void recode(const Device& device, const Recoding& job);

// budget may be null, for 1.
void update_scale(const Device& device, const LossScaleRule& rule, float* scale, int32_t* growth_tracker,
                  int32_t* budget, const float* found_inf);
void update_scale_headroom(const Device& device, const HeadroomRule& rule, float* scale, HeadroomState* state,
                           const float* found_inf, const double* largest);

// What a watch keeps of a step; all addresses are on the device.
void record(const Device& device, const StepRecord& record);

// Copies `bytes` (a multiple of 8) to the device inside kernel parameters, so the host copy may be freed immediately,
// also during graph capture.
void upload(CUstream_st* stream, void* to, const void* from, int64_t bytes);

}  // namespace fusedamp::cuda
