// Masters and states from one format into another. A warp takes a scale block, and a lane every 32nd element of it.
#include "chunks.cuh"
#include "element.cuh"

#include "../../math/quantize.h"

namespace fusedamp::cuda {
namespace {

constexpr int kBlockSize = static_cast<int>(kScaleBlock), kPerLane = kBlockSize / 32;

// The FP32 master of a 16-bit weight.
__device__ __forceinline__ float master_of(const Recoding& job, int64_t i) {
  const DType dtype = job.weight_dtype;
  const uint16_t weight = static_cast<const uint16_t*>(job.weight)[i];
  if (job.source_dtype == DType::f32) {
    const float master = static_cast<const float*>(job.source)[i];
    const uint16_t rounded = narrow<uint16_t>(master, dtype);
    return rounded == weight ? master : followed(master, rounded, weight, dtype);
  }
  const int16_t remainder = static_cast<const int16_t*>(job.source)[i];
  if (dtype == DType::bf16) return bf16_joined(weight, remainder);
  const float half = widen<float>(weight, dtype), master = f16_joined(half, remainder);
  return narrow<uint16_t>(master, dtype) == weight ? master : half;
}

__device__ __forceinline__ void split_master(const Recoding& job, int64_t i) {
  uint16_t* weight = static_cast<uint16_t*>(job.weight) + i;
  int16_t* remainder = static_cast<int16_t*>(job.target) + i;
  float master = static_cast<const float*>(job.source)[i];
  if (job.weight_dtype == DType::bf16) {
    if (!bf16_rounds_away_to(master, *weight)) master = master_of(job, i);
    *weight = float_to_bf16_away(master);
    *remainder = bf16_remainder(master);
  } else {
    master = master_of(job, i);
    *weight = narrow<uint16_t>(master, DType::f16);
    *remainder = f16_remainder(master, widen<float>(*weight, DType::f16));
  }
}

// Every lane of the warp calls it, with its first element and how many are left from there on.
template <bool kNonNegative>
__device__ __forceinline__ void quantize_lane(const Recoding& job, int64_t first, int64_t left) {
  float value[kPerLane] = {};
  uint32_t largest = 0;  // as integers, NaN > infinity > finite
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    if (32 * e < left) value[e] = value_at<float>(job.source, job.source_dtype, first + 32 * e);
    largest = max(largest, bits_of(value[e]) & 0x7fffffffu);
  }
  largest = warp_max(largest);
  const float scale = Codes<kNonNegative>::scale(largest), inverse = Codes<kNonNegative>::inverse(scale);
  if (threadIdx.x % 32 == 0) job.scales[first / kBlockSize] = scale;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e)
    if (32 * e < left)
      static_cast<CodeOf<kNonNegative>*>(job.target)[first + 32 * e] =
          static_cast<CodeOf<kNonNegative>>(Codes<kNonNegative>::nearest(value[e], scale, inverse));
}

template <bool kNonNegative>
__device__ __forceinline__ float value_of(const Recoding& job, int64_t i) {
  const auto code = static_cast<const CodeOf<kNonNegative>*>(job.source)[i];
  return Codes<kNonNegative>::template value<0>(static_cast<uint32_t>(code), job.scales[i / kBlockSize]);
}

__global__ void __launch_bounds__(kBlock) recode_kernel(const Recoding job) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / 32), lane = threadIdx.x % 32;
  int64_t block = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  for (; block * kBlockSize < job.numel; block += warps) {
    const int64_t first = block * kBlockSize + lane, left = job.numel - first;
    if (job.target_dtype == DType::i8) {
      quantize_lane<false>(job, first, left);
      continue;
    }
    if (job.target_dtype == DType::u8) {
      quantize_lane<true>(job, first, left);
      continue;
    }
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const int64_t i = first + 32 * e;
      if (32 * e >= left) break;
      if (job.target_dtype == DType::i16) {
        split_master(job, i);
      } else {
        static_cast<float*>(job.target)[i] = job.source_dtype == DType::i8   ? value_of<false>(job, i)
                                             : job.source_dtype == DType::u8 ? value_of<true>(job, i)
                                                                             : master_of(job, i);
      }
    }
  }
}

}  // namespace

void recode(const Device& device, const Recoding& job) {
  if (job.numel == 0) return;
  const int64_t elements = int64_t{kBlock} / 32 * kBlockSize;
  launch_over((job.numel + elements - 1) / elements, device, "recode", &recode_kernel, job);
}

}  // namespace fusedamp::cuda
