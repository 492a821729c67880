// Elements in memory and in registers. A list's elements are read as unsigned integers of their size, several at a
// time. A block-uniform branch then decides whether 16 bits are FP16 or BF16. So one loop per size serves all
// combinations of types, and loads never wait for that branch.
#pragma once
#include <type_traits>

#include "platform.cuh"

#include "../../include/fusedamp/rows.h"
#include "../../math/follow.h"
#include "../../math/rounding.h"

namespace fusedamp::cuda {

template <int kBytes>
struct RawOf;
template <>
struct RawOf<2> {
  using type = uint16_t;
};
template <>
struct RawOf<4> {
  using type = uint32_t;
};
template <>
struct RawOf<8> {
  using type = uint64_t;
};
template <class V>
using Raw = typename RawOf<sizeof(V)>::type;

// N adjacent elements, loaded or stored by one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <class V>
__device__ __forceinline__ V widen(uint16_t raw, DType dtype) {
  if (dtype == DType::bf16) return bf16_to_float(raw);
  __half_raw half;
  half.x = raw;
  return __half2float(half);
}
template <class V>
__device__ __forceinline__ V widen(uint32_t raw, DType) {
  return float_of(raw);
}
template <class V>
__device__ __forceinline__ V widen(uint64_t raw, DType) {
  double x;
  memcpy(&x, &raw, sizeof x);
  return static_cast<V>(x);
}

// Rounds to nearest, ties to even, if R is narrower than the value.
template <class R>
__device__ __forceinline__ R narrow(float x, DType dtype) {
  if constexpr (sizeof(R) == 4) {
    return bits_of(x);
  } else {
    if (dtype == DType::bf16) return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x;
    return static_cast<__half_raw>(__float2half_rn(x)).x;
  }
}
template <class R>
__device__ __forceinline__ R narrow(double x, DType) {
  R raw;
  static_assert(sizeof raw == sizeof x, "float64 is stored as it is");
  memcpy(&raw, &x, sizeof raw);
  return raw;
}

// Returns the master for a modified weight: `rounded` is the old master rounded, `bits` the weight.
__device__ __forceinline__ float followed(float master, uint16_t rounded, uint16_t bits, DType dtype) {
  const float weight = widen<float>(bits, dtype);
  const float moved = dtype == DType::bf16 ? bf16_moved(master, rounded, bits)
                                           : f16_moved(master, widen<float>(rounded, dtype), weight);
  return narrow<uint16_t>(moved, dtype) == bits ? moved : weight;
}

// One element of any type; for paths where speed does not matter.
template <class V>
__device__ __forceinline__ V value_at(const void* list, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return widen<V>(static_cast<const uint64_t*>(list)[i], dtype);
    case DType::f32: return widen<V>(static_cast<const uint32_t*>(list)[i], dtype);
    default: return widen<V>(static_cast<const uint16_t*>(list)[i], dtype);
  }
}

// Number of elements before the first N-element boundary.
template <int N, class T>
__device__ __forceinline__ int elements_to_boundary(const T* list) {
  return static_cast<int>((N - reinterpret_cast<uintptr_t>(list) / sizeof(T) % N) % N);
}

// Calls visit(i, width) over 0 .. n - 1 by all threads of the block: `head` elements one by one, then N at a time, then
// the rest one by one. head = n if the lists have no common alignment. `width` is N or 1 as a constant.
// kAhead: number of loads of N that a thread may have in flight if visit() does not store.
template <int N>
using Width = std::integral_constant<int, N>;
template <int N, int kAhead = 1, class Visit>
__device__ __forceinline__ void for_each_element(int n, int head, Visit visit) {
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  head = head < n ? head : n;
  const int tail = head + (n - head) / N * N, stride = threads * N;
  int i = head + tid * N;
  if constexpr (kAhead > 1) {
    for (; i + (kAhead - 1) * stride < tail; i += kAhead * stride) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) visit(i + a * stride, Width<N>());
    }
  }
  for (; i < tail; i += stride) visit(i, Width<N>());
  const int singles = head + (n - tail);
  for (int s = tid; s < singles; s += threads) visit(s < head ? s : s - head + tail, Width<1>());
}

}  // namespace fusedamp::cuda
