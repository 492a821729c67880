// unscale_: grads *= inv_scale in place; the flag tells if an element is not finite before, or after as stored.
#include "chunks.cuh"
#include "element.cuh"

namespace fusedamp::cuda {
namespace {

// G: the raw type; V: the arithmetic type. A non-finite value stays non-finite when multiplied and rounded (infinity
// times zero is NaN), so checking the stored value is enough.
template <class V, class G>
__device__ __forceinline__ bool unscale_chunk(const GradRow& row, Span span, V inv_scale) {
  constexpr int kVector = 16 / sizeof(G);
  G* grads = in_global(static_cast<G*>(row.grad) + span.first);
  const DType dtype = row.dtype;
  bool bad = false;
  for_each_element<kVector>(span.count, elements_to_boundary<kVector>(grads), [&](int i, auto width) {
    constexpr int N = decltype(width)::value;
    Pack<G, N> grad = load<N>(grads + i);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      grad.v[e] = narrow<G>(widen<V>(grad.v[e], dtype) * inv_scale, dtype);
      const V stored = widen<V>(grad.v[e], dtype);
      bad |= !(stored - stored == V(0));
    }
    store<N>(grads + i, grad);
  });
  return bad;
}

__global__ void __launch_bounds__(kBlock)
    unscale_kernel(const Table<GradRow> table, const float* inv_scale_at, float* found_inf) {
  const float inv_scale = *inv_scale_at;
  bool bad = false;
  int64_t r = -1;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    r = find_row(table, chunk, r);
    const GradRow row = table.rows[r].row;
    const Span span = span_of(table.rows[r], chunk);
    switch (size_of(row.dtype)) {
      case 2: bad |= unscale_chunk<float, uint16_t>(row, span, inv_scale); break;
      case 4: bad |= unscale_chunk<float, uint32_t>(row, span, inv_scale); break;
      default: bad |= unscale_chunk<double, uint64_t>(row, span, static_cast<double>(inv_scale));
    }
  }
  if (__syncthreads_or(bad) && threadIdx.x == 0) atomicExch(found_inf, 1.0f);  // several blocks may
}

}  // namespace

void unscale(const Device& device, const std::vector<GradRow>& rows, const float* inv_scale, float* found_inf) {
  const Table<GradRow> table = place(device, rows);
  if (table.chunk_count == 0) return;
  launch_over(table.chunk_count, device, "unscale", &unscale_kernel, table, inv_scale, found_inf);
}

}  // namespace fusedamp::cuda
