// Writes what a watch keeps of a step into its rings: one launch, for any step, whether due or not.
#include "chunks.cuh"

#include "../record.h"

namespace fusedamp::cuda {
namespace {

struct Larger {
  __device__ __forceinline__ double operator()(double a, double b) const { return a >= b ? a : b; }
};

__global__ void __launch_bounds__(kBlock) record_kernel(const StepRecord record) {
  const RecordedStep step = recorded_step(record);
  const int64_t worker = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  record_tensors(record, step, worker, int64_t{gridDim.x} * blockDim.x);
  if (blockIdx.x == 0) {
    double largest = 0.0;
    for (int64_t i = threadIdx.x; i < record.count; i += blockDim.x)
      largest = Larger()(record.extremes[kExtremes * i], largest);
    largest = block_reduce(largest, Larger());
    if (threadIdx.x == 0) record_step(record, step, largest);
  }
  __syncthreads();  // all threads of this block have read the clock
  if (threadIdx.x != 0) return;
  auto* finished = reinterpret_cast<unsigned*>(record.clock + 1);
  __threadfence();
  if (atomicAdd(finished, 1u) != gridDim.x - 1) return;
  __threadfence();
  *finished = 0;  // for the next launch
  advance(record);
}

}  // namespace

void record(const Device& device, const StepRecord& record) {
  launch_over(std::max<int64_t>(1, record.count * kBins / kBlock), device, "record", &record_kernel, record);
}

}  // namespace fusedamp::cuda
