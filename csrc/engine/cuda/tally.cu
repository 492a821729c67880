#include "tally.cuh"

namespace fusedamp::cuda {
namespace {

// Blocks take tensors.
__global__ void __launch_bounds__(kBlock)
    sum_up_kernel(const StepRows table, const int64_t* places, const float* found_inf, const Tally tally,
                  const ChunkTally* records) {
  if (overflowed(found_inf) || (tally.due && *tally.due == 0)) return;
  for (int64_t r = blockIdx.x; r < table.row_count; r += gridDim.x) {
    const int64_t end = r + 1 < table.row_count ? table.rows[r + 1].first_chunk : table.chunk_count;
#pragma unroll
    for (int j = 0; j < kTallies; ++j) {
      double sum = 0.0;
      for (int64_t c = table.rows[r].first_chunk + threadIdx.x; c < end; c += blockDim.x) sum += records[c].sums[j];
      sum = block_reduce(sum, Add());
      if (threadIdx.x == 0) tally.updates[kTallies * places[r] + j] = sum;
    }
  }
}

}  // namespace

void sum_up_tallies(const Device& device, const StepRows& table, const std::vector<int64_t>& places,
                    const StepScalars& scalars, const Tally& tally, const ChunkTally* records) {
  const auto bytes = static_cast<int64_t>(places.size() * sizeof places[0]);
  const auto* resident = static_cast<const int64_t*>(device.resident(places.data(), bytes));
  launch_over(table.row_count, device, "sum_up", &sum_up_kernel, table, resident, scalars.found_inf, tally, records);
}

}  // namespace fusedamp::cuda
