// A flat index over all chunks of all tensors of a list, and reductions over a block.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "engine.h"
#include "platform.cuh"

namespace fusedamp::cuda {

// A row in device memory. Its chunks are first_chunk, first_chunk + 1 ...; an empty tensor has none.
template <class Row>
struct Placed {
  Row row;
  int64_t first_chunk;
};

template <class Row>
struct Table {
  const Placed<Row>* rows;
  int64_t row_count, chunk_count;
};

// Rows on the host, with their chunks.
template <class Row>
struct Gathered {
  std::vector<Placed<Row>> rows;
  int64_t chunk_count = 0;

  void add(const Row& row) {
    rows.push_back({row, chunk_count});
    chunk_count += (row.numel + kChunk - 1) / kChunk;
  }
  Table<Row> on(const Device& device) const {
    static_assert(sizeof(Placed<Row>) % 8 == 0, "uploads go in words of 8 bytes");
    static_assert(std::has_unique_object_representations_v<Placed<Row>>, "padding would make equal tables differ");
    const void* resident = device.resident(rows.data(), static_cast<int64_t>(rows.size() * sizeof rows[0]));
    return {static_cast<const Placed<Row>*>(resident), static_cast<int64_t>(rows.size()), chunk_count};
  }
};

template <class Row>
Table<Row> place(const Device& device, const std::vector<Row>& rows) {
  Gathered<Row> gathered;
  gathered.rows.reserve(rows.size());
  for (const Row& row : rows) gathered.add(row);
  return gathered.on(device);
}

// Launches a kernel whose blocks process every gridDim-th of `units`, with as many blocks as run concurrently. With
// more, the last ones would run alone and leave memory bandwidth idle.
template <class... Parameters, class... Arguments>
void launch_over(int64_t units, const Device& device, const char* name, void (*kernel)(Parameters...),
                 const Arguments&... arguments) {
  const int64_t resident = int64_t{resident_blocks(kernel)} * device.multiprocessors;
  const int64_t blocks = std::max<int64_t>(1, std::min(units, resident));
  launch(name, kernel, blocks, kBlock, device.stream, arguments...);
}

// Returns the row of `chunk`: the last one that starts at or before it. All threads of the block must call it; `hint`
// is the previous result, or -1. A round divides the remaining rows by the number of threads.
template <class Row>
__device__ __forceinline__ int64_t find_row(const Table<Row>& table, int64_t chunk, int64_t hint) {
  if (hint >= 0 && (hint + 1 == table.row_count || table.rows[hint + 1].first_chunk > chunk)) return hint;
  int64_t from = 0, count = table.row_count;
  while (count > 1) {
    const int64_t stride = (count + blockDim.x - 1) / blockDim.x, mine = threadIdx.x * stride;
    const bool before = mine < count && table.rows[from + mine].first_chunk <= chunk;
    const int64_t last = (__syncthreads_count(before) - 1) * stride;
    from += last;
    count = min(stride, count - last);
  }
  return from;
}

// The part of a row that one chunk covers.
struct Span {
  int64_t first;
  int count;
};
template <class Row>
__device__ __forceinline__ Span span_of(const Placed<Row>& placed, int64_t chunk) {
  const int64_t first = (chunk - placed.first_chunk) * kChunk, left = placed.row.numel - first;
  return {first, static_cast<int>(left < kChunk ? left : kChunk)};
}

// Combines every thread's x, in an order that depends only on the block size; every thread gets the result.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, Combine combine) {
  FUSEDAMP_SHARED(T, of_warp, 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int distance = 16; distance > 0; distance /= 2) x = combine(x, __shfl_down_sync(0xffffffffu, x, distance));
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  x = of_warp[0];
  for (int w = 1; w < warps; ++w) x = combine(x, of_warp[w]);
  __syncthreads();  // before of_warp is written again
  return x;
}

struct Add {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

__device__ __forceinline__ bool overflowed(const float* found_inf) { return found_inf && !(*found_inf == 0.0f); }

}  // namespace fusedamp::cuda
