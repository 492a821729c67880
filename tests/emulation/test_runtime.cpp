// The emulation itself. Without an argument: every feature works as CUDA documents. With one: a defect that the
// emulation or a sanitizer must detect.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_emulation.h"

namespace {

int failures = 0;
void expect_equal(long got, long wanted, int line) {
  if (got != wanted && ++failures < 9)
    printf("FAIL line %d, thread %u: %ld, wanted %ld\n", line, threadIdx.x, got, wanted);
}
#define EQUAL(got, wanted) expect_equal(static_cast<long>(got), static_cast<long>(wanted), __LINE__)
constexpr unsigned kAll = 0xffffffffu;

__global__ void warp_functions() {
  const int lane = threadIdx.x % 32, value = 100 + lane;
  for (int width = 1; width <= 32; width *= 2) {
    const int first = lane / width * width, end = first + width;
    for (int d = 0; d < 32; ++d) {
      EQUAL(__shfl_down_sync(kAll, value, d, width), lane + d < end ? value + d : value);
      EQUAL(__shfl_up_sync(kAll, value, d, width), lane - d >= first ? value - d : value);
      EQUAL(__shfl_sync(kAll, value, d, width), 100 + first + d % width);
      EQUAL(__shfl_xor_sync(kAll, value, d, width), (lane ^ d) < end ? 100 + (lane ^ d) : value);
    }
  }
  EQUAL(2 * __shfl_sync(kAll, lane / 2.0, 5), 5);
  EQUAL(__half2float(__shfl_sync(kAll, __float2half(static_cast<float>(lane)), 7)), 7);
  EQUAL(__ballot_sync(kAll, lane & 1), 0xaaaaaaaau);
  EQUAL(__any_sync(kAll, lane == 9), 1);
  EQUAL(__all_sync(kAll, lane < 31), 0);
  EQUAL(__all_sync(kAll, lane < 32), 1);
  if (lane < 16) {
    EQUAL(__shfl_xor_sync(0xffffu, value, 8), 100 + (lane ^ 8));
  } else {
    EQUAL(__ballot_sync(0xffff0000u, 1), 0xffff0000u);
  }
}

__global__ void barriers() {
  FUSEDAMP_SHARED(int, slot, 96);
  EQUAL(slot[threadIdx.x], -1);  // new for each block
  slot[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  EQUAL(slot[blockDim.x - 1 - threadIdx.x], blockDim.x - 1 - threadIdx.x);
  EQUAL(__syncthreads_count(threadIdx.x % 3 == 0), (blockDim.x + 2) / 3);
  EQUAL(__syncthreads_and(1), 1);
  EQUAL(__syncthreads_and(threadIdx.x != 4), 0);
  EQUAL(__syncthreads_or(threadIdx.x == 4), 1);
  const unsigned warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  for (unsigned d = 16; d > 0; d /= 2) {  // a sum over the warp through shared memory
    const int other = lane < d ? slot[threadIdx.x + d] : 0;
    __syncwarp();
    if (lane < d) slot[threadIdx.x] += other;
    __syncwarp();
  }
  EQUAL(slot[warp], 32 * warp + 496);
}

__global__ void atomics(int* sum, float* half_sum, unsigned* largest, unsigned* flag) {
  atomicAdd(sum, 1);
  atomicAdd(half_sum, 0.5f);
  atomicMax(largest, threadIdx.x + blockIdx.x * blockDim.x);
  atomicExch(flag, 7u);
}

// ---- defects

__global__ void writes_past_shared_memory() {
  FUSEDAMP_SHARED(int, slot, 64);
  slot[threadIdx.x + 1] = 1;
}
__global__ void leaves_before_a_barrier() {
  if (threadIdx.x >= 60) return;
  __syncthreads();
}
__global__ void waits_at_two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void names_absent_lanes() {
  if (threadIdx.x % 32 < 8) __shfl_down_sync(kAll, 1, 4);
}
__global__ void reads_a_lane_outside_the_mask() {
  if (threadIdx.x % 32 < 8) __shfl_down_sync(0xffu, 1, 4);
}
__global__ void forgets_a_barrier() {
  FUSEDAMP_SHARED(int, slot, 64);
  slot[threadIdx.x] = 1;
  if (slot[63 - threadIdx.x] > 1) puts("");
}
__global__ void counts_without_atomics(int* count) {
  if (threadIdx.x == 0) ++*count;
}
__global__ void reads_results_without_a_fence(int* results, unsigned* finished, int* sum) {
  if (threadIdx.x > 0) return;
  results[blockIdx.x] = 1;
  if (atomicAdd(finished, 1u) < gridDim.x - 1) return;
  for (unsigned b = 0; b < gridDim.x; ++b) *sum += results[b];
}

template <class... P, class... A>
void run(void (*kernel)(P...), A... arguments) {
  fusedamp::cuda::launch("test", kernel, 3, 64, nullptr, arguments...);
}

int run_defect(const char* name) {
  int results[3] = {}, sum = 0;
  unsigned finished = 0;
#define DEFECT(kernel, ...) \
  if (!strcmp(name, #kernel)) return run(kernel, ##__VA_ARGS__), 0
  DEFECT(writes_past_shared_memory);
  DEFECT(leaves_before_a_barrier);
  DEFECT(waits_at_two_barriers);
  DEFECT(names_absent_lanes);
  DEFECT(reads_a_lane_outside_the_mask);
  DEFECT(forgets_a_barrier);
  DEFECT(counts_without_atomics, &sum);
  DEFECT(reads_results_without_a_fence, results, &finished, &sum);
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return run_defect(argv[1]);
  for (int schedule = 0; schedule < 8; ++schedule) {
    emulation::set_schedule(schedule);
    run(warp_functions);
    fusedamp::cuda::launch("barriers", barriers, 3, 96, nullptr);
    int sum = 0;
    float half_sum = 0.0f;
    unsigned largest = 0, flag = 0;
    run(atomics, &sum, &half_sum, &largest, &flag);
    failures += sum != 192 || half_sum != 96.0f || largest != 191 || flag != 7;
  }
  printf("%d failures\n", failures);
  return failures != 0;
}
