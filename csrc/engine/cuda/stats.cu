// The gradient check: norms, and each tensor's counts of infinities, NaNs and elements that overflow when unscaled. One
// launch reads every gradient and writes one record per chunk; another combines them in a fixed order, so results are
// reproducible.
#include <cmath>

#include "chunks.cuh"
#include "element.cuh"
#include "numerics.cuh"

#include "../check.h"

namespace fusedamp::cuda {
namespace {

enum class Norm : int { kTwo, kOne, kMax, kGeneral };

struct Job {
  Norm norm;
  double p;
};

Job job_of(double norm_type) {
  const Norm norm = norm_type == 2.0        ? Norm::kTwo
                    : norm_type == 1.0      ? Norm::kOne
                    : std::isinf(norm_type) ? Norm::kMax
                                            : Norm::kGeneral;
  return {norm, norm_type};
}

struct alignas(16) ChunkStats {
  double power_sum;
  uint16_t infs, nans, overflows;
};
static_assert(kChunk <= 0xffff, "the counts of a chunk fit 16 bits");

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Combine {  // of power sums; propagates NaN
  Norm norm;
  __device__ __forceinline__ double operator()(double a, double b) const {
    return norm == Norm::kMax ? maximum(a, b) : a + b;
  }
};

template <Norm kNorm>
__device__ __forceinline__ float accumulate(float sum, float x) {
  if (kNorm == Norm::kTwo) return fma(x, x, sum);
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  if (kNorm == Norm::kOne) return sum + float_of(magnitude);
  return float_of(max(bits_of(sum), magnitude));  // as integers, NaN > infinity > finite: nothing bad is lost
}

// One thread's result for a chunk in float; `nonzero`: whether an element is not 0.
struct FastSum {
  float sum;
  uint32_t nonzero;
};
// kDType is a constant: a branch on it would order the loads of one iteration after those of the previous one.
template <Norm kNorm, class G, DType kDType, class Seen>
__device__ __forceinline__ FastSum fast_sum(const GradRow& row, Span span, float inv_scale, Seen& seen) {
  constexpr int kVector = 16 / sizeof(G);
  const G* grads = in_global(static_cast<const G*>(row.grad) + span.first);
  FastSum found = {0.0f, 0};
  for_each_element<kVector, 4>(span.count, elements_to_boundary<kVector>(grads), [&](int i, auto width) {
    constexpr int N = decltype(width)::value;
    const Pack<G, N> grad = load<N>(grads + i);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float stored = widen<float>(grad.v[e], kDType), x = stored * inv_scale;
      seen.see(stored);
      found.sum = accumulate<kNorm>(found.sum, x);
      found.nonzero |= bits_of(x) << 1;
    }
  });
  return found;
}
template <Norm kNorm, class Seen>
__device__ __forceinline__ FastSum fast_sum(const GradRow& row, Span span, float inv_scale, Seen& seen) {
  if (row.dtype == DType::f32) return fast_sum<kNorm, uint32_t, DType::f32>(row, span, inv_scale, seen);
  if (row.dtype == DType::bf16) return fast_sum<kNorm, uint16_t, DType::bf16>(row, span, inv_scale, seen);
  return fast_sum<kNorm, uint16_t, DType::f16>(row, span, inv_scale, seen);
}

__device__ __forceinline__ double magnitude_of(double x) { return x < 0.0 ? -x : x; }

template <bool kGeneral>
__device__ __forceinline__ double power(const Job& job, double a) {
  if constexpr (kGeneral) return job.p == 0.0 ? static_cast<double>(a != 0.0) : pow(a, job.p);
  return job.norm == Norm::kTwo ? a * a : a;
}

// In double with counts, element by element: if the fast sum is inconclusive, for float64, and for norms of any order.
template <class V, bool kGeneral, class Seen>
__device__ __forceinline__ ChunkStats exact_stats(const GradRow& row, Span span, float inv_scale, const Job& job,
                                                  Seen& seen) {
  const Combine combine = {job.norm};
  double power_sum = 0.0;
  uint32_t infs = 0, nans = 0, overflows = 0;
  for (int i = threadIdx.x; i < span.count; i += blockDim.x) {
    const V g = value_at<V>(row.grad, row.dtype, span.first + i), x = g * static_cast<V>(inv_scale);
    seen.see(g);
    power_sum = combine(power_sum, power<kGeneral>(job, magnitude_of(x)));
    if (x - x == V(0)) continue;
    if (g != g) {
      ++nans;
    } else if (g - g == V(0)) {
      ++overflows;
    } else {
      ++infs;
    }
  }
  power_sum = block_reduce(power_sum, combine);
  const uint64_t counts = block_reduce(infs | uint64_t{nans} << 16 | uint64_t{overflows} << 32, Sum());
  return {power_sum, static_cast<uint16_t>(counts), static_cast<uint16_t>(counts >> 16),
          static_cast<uint16_t>(counts >> 32)};
}

// Every thread of the block gets the result. `seen` sees the thread's elements once.
template <bool kGeneral, class Seen>
__device__ __forceinline__ ChunkStats chunk_stats(const GradRow& row, Span span, float inv_scale, const Job& job,
                                                  Seen& seen) {
  if (row.dtype == DType::f64) return exact_stats<double, kGeneral>(row, span, inv_scale, job, seen);
  if constexpr (!kGeneral) {
    const FastSum mine = job.norm == Norm::kTwo   ? fast_sum<Norm::kTwo>(row, span, inv_scale, seen)
                         : job.norm == Norm::kOne ? fast_sum<Norm::kOne>(row, span, inv_scale, seen)
                                                  : fast_sum<Norm::kMax>(row, span, inv_scale, seen);
    const double sum = block_reduce(static_cast<double>(mine.sum), Combine{job.norm});
    // A finite sum of magnitudes proves every element finite. If squares sum to less, bits may have been lost to
    // underflow.
    constexpr double kSmall = 0x1p-100;
    const bool lossy = job.norm == Norm::kTwo && sum < kSmall && __syncthreads_or(mine.nonzero != 0);
    if (sum - sum == 0.0 && !lossy) return {sum, 0, 0, 0};
    NoExtremes again;
    return exact_stats<float, false>(row, span, inv_scale, job, again);
  } else {
    return exact_stats<float, true>(row, span, inv_scale, job, seen);
  }
}

// The factor of gradients: *inv_scale, or 1 / *scale, or 1 if both are null.
struct Factor {
  const float *inv_scale, *scale;
  __device__ __forceinline__ float value() const { return inv_scale ? *inv_scale : scale ? reciprocal(*scale) : 1.0f; }
};

// For the next launch.
__device__ __forceinline__ void reset(unsigned* finished) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished = 0;
}

template <bool kGeneral>
__global__ void __launch_bounds__(kBlock) stats_kernel(const Table<GradRow> table, const Factor factor, const Job job,
                                                       ChunkStats* records, unsigned* finished) {
  reset(finished);
  const float inv_scale = factor.value();
  int64_t r = -1;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    r = find_row(table, chunk, r);
    NoExtremes none;
    const ChunkStats found =
        chunk_stats<kGeneral>(table.rows[r].row, span_of(table.rows[r], chunk), inv_scale, job, none);
    if (threadIdx.x == 0) records[chunk] = found;
  }
}

__device__ __forceinline__ bool is_idle(const NoNumerics&) { return false; }
__device__ __forceinline__ bool is_idle(const NumericsPass& pass) { return pass.out.only_due && *pass.out.due == 0; }

// The same with numerics, and with as many blocks per multiprocessor: without the second bound, some architectures get
// more registers.
template <bool kGeneral>
__global__ void __launch_bounds__(kBlock, kGeneral ? 4 : 6)
    numerics_kernel(const Table<GradRow> table, const Factor factor, const Job job, ChunkStats* records,
                    unsigned* finished, const NumericsPass pass) {
  reset(finished);
  if (is_idle(pass)) return;
  const float inv_scale = factor.value();
  int64_t r = -1;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    r = find_row(table, chunk, r);
    const GradRow& row = table.rows[r].row;
    const Span span = span_of(table.rows[r], chunk);
    Extremes seen;
    const ChunkStats found = chunk_stats<kGeneral>(row, span, inv_scale, job, seen);
    const ChunkExtremes extremes = seen.reduced();
    if (threadIdx.x == 0) {
      records[chunk] = found;
      pass.extremes[chunk] = extremes;
    }
    if (*pass.out.due != 0) chunk_bins(row, span, pass.bins + chunk);
  }
}

// Blocks process tensors; the last block to finish computes the total, and finishes the check if `check` has a scale.
template <class Pass>
__global__ void __launch_bounds__(kBlock)
    combine_kernel(const Table<GradRow> table, const Norm norm, const ChunkStats* records, unsigned* finished,
                   const StatsOutputs out, const GradCheck check, const Pass pass) {
  if (is_idle(pass)) return;
  constexpr int kAhead = 8;
  const Combine combine = {norm};
  for (int64_t r = blockIdx.x; r < table.row_count; r += gridDim.x) {
    const int64_t end = r + 1 < table.row_count ? table.rows[r + 1].first_chunk : table.chunk_count;
    double power_sum = 0.0;
    int64_t infs = 0, nans = 0, overflows = 0;
    for (int64_t c = table.rows[r].first_chunk + threadIdx.x; c < end; c += kAhead * blockDim.x) {
      ChunkStats ahead[kAhead];  // all loads are issued before the first use
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t at = c + a * blockDim.x;
        ahead[a] = at < end ? records[at] : ChunkStats{};
      }
#pragma unroll
      for (const ChunkStats& record : ahead) {
        power_sum = combine(power_sum, record.power_sum);
        infs += record.infs;
        nans += record.nans;
        overflows += record.overflows;
      }
    }
    power_sum = block_reduce(power_sum, combine);
    infs = block_reduce(infs, Sum());
    nans = block_reduce(nans, Sum());
    overflows = block_reduce(overflows, Sum());
    if (threadIdx.x == 0) {
      out.per_tensor[r] = power_sum;
      out.counts[3 * r] = infs;
      out.counts[3 * r + 1] = nans;
      out.counts[3 * r + 2] = overflows;
    }
    combine_numerics(pass, r, table.rows[r].first_chunk, end);
  }

  FUSEDAMP_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    __threadfence();  // this block's results before its ticket, every block's tickets before their results
    last[0] = atomicAdd(finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last[0]) return;
  double total = 0.0;
  bool bad = false;
  for (int64_t r = threadIdx.x; r < table.row_count; r += blockDim.x) {
    total = combine(total, __ldcg(out.per_tensor + r));
    bad |= (__ldcg(out.counts + 3 * r) | __ldcg(out.counts + 3 * r + 1) | __ldcg(out.counts + 3 * r + 2)) != 0;
  }
  total = block_reduce(total, combine);
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    *out.total = total;
    *out.found_inf = bad ? 1.0f : 0.0f;
    if (check.scale) conclude(check, total);
  }
}

void read(const Device& device, const std::vector<GradRow>& rows, Factor factor, double norm_type,
          const StatsOutputs& out, const GradCheck& check, const Numerics& numerics) {
  const Table<GradRow> table = place(device, rows);
  const Job job = job_of(norm_type);
  const bool general = job.norm == Norm::kGeneral;
  const int64_t chunks = table.chunk_count;
  const int64_t per_chunk = sizeof(ChunkStats) + (numerics.extremes ? sizeof(ChunkExtremes) + sizeof(ChunkBins) : 0);
  auto* records = static_cast<ChunkStats*>(device.scratch(chunks * per_chunk + 16));
  if (!numerics.extremes) {
    auto* finished = reinterpret_cast<unsigned*>(records + chunks);
    launch_over(chunks, device, "grad_stats", general ? &stats_kernel<true> : &stats_kernel<false>, table, factor, job,
                records, finished);
    launch_over(table.row_count, device, "combine", &combine_kernel<NoNumerics>, table, job.norm,
                static_cast<const ChunkStats*>(records), finished, out, check, NoNumerics());
    return;
  }
  auto* extremes = reinterpret_cast<ChunkExtremes*>(records + chunks);
  auto* bins = reinterpret_cast<ChunkBins*>(extremes + chunks);
  auto* finished = reinterpret_cast<unsigned*>(bins + chunks);
  const NumericsPass pass = {numerics, extremes, bins};
  launch_over(chunks, device, "grad_numerics", general ? &numerics_kernel<true> : &numerics_kernel<false>, table,
              factor, job, records, finished, pass);
  launch_over(table.row_count, device, "combine", &combine_kernel<NumericsPass>, table, job.norm,
              static_cast<const ChunkStats*>(records), finished, out, check, pass);
}

}  // namespace

void grad_stats(const Device& device, const std::vector<GradRow>& rows, const float* inv_scale, double norm_type,
                const StatsOutputs& out, const Numerics& numerics) {
  read(device, rows, {inv_scale, nullptr}, norm_type, out, {}, numerics);
}

void check_grads(const Device& device, const std::vector<GradRow>& rows, const GradCheck& check, double* per_tensor,
                 const Numerics& numerics) {
  const auto count = per_tensor ? 0 : static_cast<int64_t>(rows.size());
  auto* total = static_cast<double*>(device.scratch((1 + count) * static_cast<int64_t>(sizeof(double))));
  read(device, rows, {nullptr, check.scale}, check.norm_type,
       {check.found_inf, total, per_tensor ? per_tensor : total + 1, check.counts}, check, numerics);
}

}  // namespace fusedamp::cuda
