// Steps of tensors with split masters, 16- or 8-bit states, or stochastically rounded weights: one loop for every mix
// of formats. A warp takes a scale block, so that the largest magnitude of a block is found by shuffles alone, and a
// lane four neighbours, which move by one access: 16 bytes of the widest list. Formats are branches that a block takes
// together.
#pragma once
#include "coeffs.cuh"

#include "../../math/quantize.h"
#include "../../math/split.h"

namespace fusedamp::cuda {

constexpr int kPerLane = static_cast<int>(kScaleBlock) / 32;
static_assert(kChunk % kScaleBlock == 0, "chunks have whole scale blocks");
static_assert((int64_t{1} << 32) % kChunk == 0, "indices of a chunk share their upper 32 bits");

inline bool is_compressed(const StepRow& row, const StepScalars& scalars) {
  if (row.param_dtype == DType::f64) return false;
  const bool split = row.master && row.master_dtype == DType::i16;
  const bool dithered = scalars.stochastic && !row.master && is_16bit(row.param_dtype);
  return split || dithered || row.state_dtype != DType::f32;
}

// A lane's elements as they lie in memory: the first one, two or four words, by their size. What is loaded is not
// looked at before every list is under way: the first use waits for memory.
struct Words {
  uint32_t v[kPerLane];
};
// The same elements, one to a word; those past the end are 0.
struct Stored {
  uint32_t v[kPerLane];
};
static_assert(kPerLane == 4, "a list of R has sizeof(R) words of 4 bytes in a lane");

template <class R>
__device__ __forceinline__ bool in_one_access(const R* list, int count) {
  return count == kPerLane && reinterpret_cast<uintptr_t>(list) % (kPerLane * sizeof(R)) == 0;
}
template <class R>
__device__ __forceinline__ Words fetch(const void* list, int64_t at, int count) {
  constexpr int kSize = sizeof(R);
  const R* from = in_global(static_cast<const R*>(list) + at);
  Words words = {};
  if (in_one_access(from, count)) {
    const Pack<uint32_t, kSize> pack = load<kSize>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
    for (int w = 0; w < kSize; ++w) words.v[w] = pack.v[w];
  } else {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      if (e < count) words.v[e * kSize / 4] |= static_cast<uint32_t>(from[e]) << 8 * kSize * e % 32;
  }
  return words;
}
__device__ __forceinline__ Words fetch(const void* list, DType dtype, int64_t at, int count) {
  if (dtype == DType::f32) return fetch<uint32_t>(list, at, count);
  if (is_8bit(dtype)) return fetch<uint8_t>(list, at, count);
  return fetch<uint16_t>(list, at, count);
}
template <class R>
__device__ __forceinline__ Stored unpacked(const Words& words) {
  Stored stored;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e)
    stored.v[e] = static_cast<R>(words.v[e * static_cast<int>(sizeof(R)) / 4] >> 8 * sizeof(R) * e % 32);
  return stored;
}
__device__ __forceinline__ Stored unpacked(const Words& words, DType dtype) {
  if (dtype == DType::f32) return unpacked<uint32_t>(words);
  if (is_8bit(dtype)) return unpacked<uint8_t>(words);
  return unpacked<uint16_t>(words);
}
template <class R>
__device__ __forceinline__ void put(void* list, int64_t at, int count, const Stored& stored) {
  constexpr int kSize = sizeof(R);
  R* to = in_global(static_cast<R*>(list) + at);
  if (in_one_access(to, count)) {
    uint32_t words[kSize] = {};
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      words[e * kSize / 4] |= static_cast<uint32_t>(static_cast<R>(stored.v[e])) << 8 * kSize * e % 32;
    // By intrinsic: an ordinary store the compiler splits, to share its parts with the branch below.
    if constexpr (kSize == 4) __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    if constexpr (kSize == 2) __stwb(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
    if constexpr (kSize == 1) __stwb(reinterpret_cast<unsigned*>(to), words[0]);
  } else {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      if (e < count) to[e] = static_cast<R>(stored.v[e]);
  }
}
__device__ __forceinline__ void put(void* list, DType dtype, int64_t at, int count, const Stored& stored) {
  if (dtype == DType::f32) return put<uint32_t>(list, at, count, stored);
  if (is_8bit(dtype)) return put<uint8_t>(list, at, count, stored);
  put<uint16_t>(list, at, count, stored);
}

__device__ __forceinline__ float widen_word(uint32_t word, DType dtype) {
  return dtype == DType::f32 ? float_of(word) : widen<float>(static_cast<uint16_t>(word), dtype);
}
__device__ __forceinline__ uint16_t narrow_half(float x, DType dtype) { return narrow<uint16_t>(x, dtype); }

// What is stepped, from the weight and, where there is one, the master or remainder beside it.
__device__ __forceinline__ float weight_of(const StepRow& row, uint32_t param, uint32_t master) {
  const float weight = widen_word(param, row.param_dtype);
  if (!row.master) return weight;
  const auto half = static_cast<uint16_t>(param);
  if (row.master_dtype == DType::f32)  // a weight that is not its master rounded was written: the master follows
    return narrow_half(float_of(master), row.param_dtype) == half ? float_of(master) : weight;
  const auto remainder = static_cast<int16_t>(master);
  if (row.param_dtype == DType::bf16) return bf16_joined(half, remainder);
  const float joined = f16_joined(weight, remainder);
  return narrow_half(joined, DType::f16) == half ? joined : weight;
}
// The weight as it is stored; `master` becomes what is stored beside it.
__device__ __forceinline__ uint32_t weight_stored(const StepRow& row, float weight, bool stochastic, uint32_t random,
                                                  uint32_t& master) {
  if (row.param_dtype == DType::f32) return bits_of(weight);
  if (row.master && row.master_dtype == DType::i16) {
    if (row.param_dtype == DType::bf16) {
      master = static_cast<uint16_t>(bf16_remainder(weight));
      return float_to_bf16_away(weight);
    }
    const uint16_t half = narrow_half(weight, DType::f16);
    master = static_cast<uint16_t>(f16_remainder(weight, widen<float>(half, DType::f16)));
    return half;
  }
  master = bits_of(weight);
  if (row.master || !stochastic) return narrow_half(weight, row.param_dtype);
  return row.param_dtype == DType::bf16 ? float_to_bf16(weight, random) : float_to_f16(weight, random);
}

template <bool kNonNegative>
__device__ __forceinline__ float state_of(DType dtype, uint32_t word, float scale) {
  if (dtype == DType::f32) return float_of(word);
  if (dtype == DType::bf16) return bf16_to_float(static_cast<uint16_t>(word));
  return Codes<kNonNegative>::value(static_cast<CodeOf<kNonNegative>>(word), scale);
}

// Every lane of the warp calls it. Writes the block's scale, returns what the lane has to store.
template <bool kNonNegative>
__device__ __forceinline__ Stored state_stored(DType dtype, const float (&state)[kPerLane], int count, RandomKey key,
                                               uint32_t index, int list, float* scale_at) {
  Stored stored;
  if (dtype == DType::f32) {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) stored.v[e] = bits_of(state[e]);
    return stored;
  }
  if (dtype == DType::bf16) {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      stored.v[e] = float_to_bf16(state[e], random_half(random_bits(key, index + e), list));
    return stored;
  }
  uint32_t largest = 0;  // as integers, NaN > infinity > finite
#pragma unroll
  for (int e = 0; e < kPerLane; ++e)
    if (e < count) largest = max(largest, bits_of(state[e]) & 0x7fffffffu);
  for (int distance = 16; distance > 0; distance /= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  const float scale = Codes<kNonNegative>::scale(largest), inverse = Codes<kNonNegative>::inverse(scale);
  if (threadIdx.x % 32 == 0) *scale_at = scale;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e)
    stored.v[e] = static_cast<uint32_t>(
        Codes<kNonNegative>::code(state[e], inverse, random_half(random_bits(key, index + e), list)));
  return stored;
}

template <class Rule, int kState>
constexpr bool kNeverNegative = (Rule::kNonNegative >> kState & 1) != 0;

// Calls visit(constant j) for each of the rule's states.
template <class Rule, class Visit>
__device__ __forceinline__ void for_each_state(Visit visit) {
  if constexpr (Rule::kStates > 0) visit(std::integral_constant<int, 0>());
  if constexpr (Rule::kStates > 1) visit(std::integral_constant<int, 1>());
  if constexpr (Rule::kStates > 2) visit(std::integral_constant<int, 2>());
}

// act(weight, gradient, states) for each element of one chunk; the results are stored where Action::kStores.
template <class Rule, class Action>
__device__ __forceinline__ void visit_compressed_chunk(const StepRow& row, Span span, Action& act, bool stochastic,
                                                       uint64_t stream) {
  constexpr int kStates = kStateRoom<Rule>;
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane_first = static_cast<int>(threadIdx.x) % 32 * kPerLane;
  constexpr int kBlockSize = static_cast<int>(kScaleBlock);
  for (int first = warp * kBlockSize; first < span.count; first += warps * kBlockSize) {
    const int left = span.count - first - lane_first, count = left < 0 ? 0 : left < kPerLane ? left : kPerLane;
    const int64_t block = (span.first + first) / kScaleBlock, at = span.first + first + lane_first;
    const auto index = static_cast<uint32_t>(at);

    const StepRow lists = row;  // one wait for all addresses, before the loads that need them
    const Words grad_words = fetch(lists.grad, lists.grad_dtype, at, count);
    const Words param_words = fetch(lists.param, lists.param_dtype, at, count);
    Words master_words = {}, state_words[kStates];
    float scales[kStates], state[kStates][kPerLane];
    if (lists.master) master_words = fetch(lists.master, lists.master_dtype, at, count);
    for_each_state<Rule>([&](auto j) {
      state_words[j] = fetch(lists.states[j], lists.state_dtype, at, count);
      scales[j] = lists.state_dtype == DType::i8 ? lists.scales[j][block] : 0.0f;
    });
    __syncwarp();  // every lane has the scale before one writes it

    const Stored grad = unpacked(grad_words, row.grad_dtype);
    Stored param = unpacked(param_words, row.param_dtype), master = unpacked(master_words, row.master_dtype);
    Stored stored[kStates];
    for_each_state<Rule>([&](auto j) { stored[j] = unpacked(state_words[j], row.state_dtype); });

    const RandomKey weight_key = random_key(stream, kWeightList, at);
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      if (!Action::kStores && e >= count) break;
      float s[kStates], weight = weight_of(row, param.v[e], master.v[e]);
      for_each_state<Rule>(
          [&](auto j) { s[j] = state_of<kNeverNegative<Rule, j>>(row.state_dtype, stored[j].v[e], scales[j]); });
      act(weight, widen_word(grad.v[e], row.grad_dtype), s);
      if constexpr (!Action::kStores) continue;
      for_each_state<Rule>([&](auto j) { state[j][e] = s[j]; });
      const uint32_t random = stochastic ? random_half(random_bits(weight_key, index + e), kWeightList) : 0u;
      param.v[e] = weight_stored(row, weight, stochastic, random, master.v[e]);
    }
    if constexpr (!Action::kStores) continue;
    put(row.param, row.param_dtype, at, count, param);
    if (row.master) put(row.master, row.master_dtype, at, count, master);
    for_each_state<Rule>([&](auto j) {
      const Stored codes = state_stored<kNeverNegative<Rule, j>>(
          row.state_dtype, state[j], count, random_key(stream, j, at), index, j, row.scales[j] + block);
      put(row.states[j], row.state_dtype, at, count, codes);
    });
  }
}

}  // namespace fusedamp::cuda
