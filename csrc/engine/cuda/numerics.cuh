// Extremes and histograms of gradients as they are stored, for the gradient check: a record per chunk, and what tensors
// get from their chunks.
#pragma once
#include "chunks.cuh"
#include "element.cuh"

#include "../../math/bins.h"

namespace fusedamp::cuda {

struct alignas(16) ChunkExtremes {
  double largest;
  uint16_t zeros, small;
};
struct alignas(16) ChunkBins {
  uint16_t counts[kBins];
};
static_assert(kChunk <= 0xffff, "the counts of a chunk fit 16 bits");

// Where a check with numerics writes. The bins of chunks are valid where *out.due is not 0.
struct NumericsPass {
  Numerics out;
  ChunkExtremes* extremes;
  ChunkBins* bins;
};

struct NoNumerics {};  // in its place

struct AddCounts {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// What one thread sees of a chunk.
struct Extremes {
  double wide = 0.0;     // the largest magnitude of FP64; infinity for NaN, too
  uint32_t largest = 0;  // that of the other dtypes, as bits: NaN > infinity > finite
  uint32_t counts = 0;   // those below 2^-14, zeros too; in the upper 16 bits zeros
  __device__ __forceinline__ void see(float x) {
    const uint32_t magnitude = bits_of(x) & Single::kMagnitude;
    largest = max(largest, magnitude);
    counts += magnitude == 0 ? 0x10001u : magnitude < Single::kLeastHalf ? 1u : 0u;
  }
  __device__ __forceinline__ void see(double x) {
    const double magnitude = x - x != 0.0 ? HUGE_VAL : x < 0.0 ? -x : x;
    wide = Largest()(wide, magnitude);
    counts += magnitude == 0.0 ? 0x10001u : magnitude < 0x1p-14 ? 1u : 0u;
  }
  // Of the block. Every thread gets the result.
  __device__ __forceinline__ ChunkExtremes reduced() const {
    const double single = float_of(min(largest, Single::kInfinity));
    const double most = block_reduce(Largest()(wide, single), Largest());
    const uint32_t sums = block_reduce(counts, AddCounts()), zeros = sums >> 16, below = sums & 0xffffu;
    return {most, static_cast<uint16_t>(zeros), static_cast<uint16_t>(below - zeros)};
  }
};
// In the place of Extremes in a check without them.
struct NoExtremes {
  template <class V>
  __device__ __forceinline__ void see(V) {}
};

template <class V, class G, DType kDType>
__device__ __forceinline__ void count_bins(const GradRow& row, Span span, uint32_t* table) {
  const G* grads = in_global(static_cast<const G*>(row.grad) + span.first);
#pragma unroll 4
  for (int i = threadIdx.x; i < span.count; i += blockDim.x) atomicAdd(table + bin_of(widen<V>(grads[i], kDType)), 1u);
}

// Counts a chunk, which was just read, from the cache. A table per warp keeps atomics of different warps apart. A block
// reduces something between two calls, so the tables are not cleared before all are read.
__device__ __forceinline__ void chunk_bins(const GradRow& row, Span span, ChunkBins* record) {
  FUSEDAMP_SHARED(uint32_t, tables, kBlock / 32 * kBins);
  const int lane = threadIdx.x % 32;
  uint32_t* mine = tables + threadIdx.x / 32 * kBins;
  mine[lane] = mine[lane + 32] = 0;
  __syncwarp();
  switch (row.dtype) {
    case DType::f64: count_bins<double, uint64_t, DType::f64>(row, span, mine); break;
    case DType::f32: count_bins<float, uint32_t, DType::f32>(row, span, mine); break;
    case DType::bf16: count_bins<float, uint16_t, DType::bf16>(row, span, mine); break;
    default: count_bins<float, uint16_t, DType::f16>(row, span, mine);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    uint32_t one = 0, two = 0;
#pragma unroll 1
    for (int w = 0; w < blockDim.x / 32; ++w) {
      one += tables[w * kBins + lane];
      two += tables[w * kBins + lane + 32];
    }
    record->counts[lane] = static_cast<uint16_t>(one);
    record->counts[lane + 32] = static_cast<uint16_t>(two);
  }
}

// Tensor r from its chunks first .. end - 1; all threads of a block call it.
__device__ __forceinline__ void combine_numerics(const NumericsPass& pass, int64_t r, int64_t first, int64_t end) {
  double largest = 0.0;
  int64_t zeros = 0, small = 0;
  for (int64_t c = first + threadIdx.x; c < end; c += blockDim.x) {
    const ChunkExtremes record = pass.extremes[c];
    largest = Largest()(largest, record.largest);
    zeros += record.zeros;
    small += record.small;
  }
  largest = block_reduce(largest, Largest());
  zeros = block_reduce(zeros, AddCounts());
  small = block_reduce(small, AddCounts());
  if (threadIdx.x == 0) {
    double* to = pass.out.extremes + 3 * r;
    to[0] = largest;
    to[1] = static_cast<double>(zeros);
    to[2] = static_cast<double>(small);
  }
  if (*pass.out.due == 0) return;

  // A warp reads records, a lane two of their bins.
  FUSEDAMP_SHARED(unsigned long long, bins, kBins);
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) bins[b] = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  unsigned long long sums[2] = {};
#pragma unroll 8
  for (int64_t c = first + warp; c < end; c += warps) {
    const Pack<uint16_t, 2> record = load<2>(pass.bins[c].counts + 2 * lane);
    sums[0] += record.v[0];
    sums[1] += record.v[1];
  }
  for (int j = 0; j < 2; ++j) atomicAdd(bins + 2 * lane + j, sums[j]);
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += blockDim.x)
    pass.out.histogram[kBins * r + b] = static_cast<int64_t>(bins[b]);  // the next tensor's reductions follow
}

__device__ __forceinline__ void combine_numerics(NoNumerics, int64_t, int64_t, int64_t) {}

}  // namespace fusedamp::cuda
