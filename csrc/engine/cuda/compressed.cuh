// Steps of tensors with split masters, 16- or 8-bit states, or stochastically rounded weights: one loop for all
// combinations of formats. A warp processes a scale block, so its maximum is a warp reduction. A lane processes four
// adjacent elements with one access per list: 16 bytes of the widest one. Branches on formats are uniform across a
// block and taken once per four elements.
#pragma once
#include "coeffs.cuh"

#include "../../math/quantize.h"

namespace fusedamp::cuda {

constexpr int kPerLane = static_cast<int>(kScaleBlock) / 32;
static_assert(kChunk % kScaleBlock == 0, "chunks consist of whole scale blocks");
static_assert(kKeyElements % kChunk == 0, "elements of a chunk share their random keys");

inline bool is_compressed(const StepRow& row) {
  if (row.param_dtype == DType::f64) return false;
  const bool split = row.master && row.master_dtype == DType::i16;
  const bool dithered = row.stochastic && !row.master && is_16bit(row.param_dtype);
  return split || dithered || row.state_dtype != DType::f32;
}

// A lane's elements in their memory format: one, two or four words, by element size. No loaded value is used before the
// loads of all lists are issued, because the first use waits for memory.
struct Words {
  uint32_t v[kPerLane];
};
// The same elements, one per word; those past the end are 0.
struct Stored {
  uint32_t v[kPerLane];
};
static_assert(kPerLane == 4, "a list of R has sizeof(R) words of 4 bytes in a lane");

__device__ __forceinline__ bool is_aligned(const void* list, DType dtype) {
  return reinterpret_cast<uintptr_t>(list) % static_cast<uintptr_t>(kPerLane * size_of(dtype)) == 0;
}
// True if every whole lane of every list needs one access.
template <class Rule>
__device__ __forceinline__ bool is_aligned(const StepRow& row, const void* grad) {
  bool aligned = is_aligned(grad, row.grad_dtype) && is_aligned(row.param, row.param_dtype) &&
                 is_aligned(row.master, row.master_dtype);
#pragma unroll
  for (int j = 0; j < Rule::kStates; ++j) aligned &= is_aligned(row.states[j], row.state_dtype);
  return aligned;
}
// kWhole: the lane is whole, and its lists are aligned.
template <bool kWhole, class R>
__device__ __forceinline__ Words fetch(const void* list, int64_t at, int count) {
  constexpr int kSize = sizeof(R);
  const R* from = in_global(static_cast<const R*>(list) + at);
  Words words = {};
  if constexpr (kWhole) {
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
template <bool kWhole>
__device__ __forceinline__ Words fetch(const void* list, DType dtype, int64_t at, int count) {
  if (dtype == DType::f32) return fetch<kWhole, uint32_t>(list, at, count);
  if (is_8bit(dtype)) return fetch<kWhole, uint8_t>(list, at, count);
  return fetch<kWhole, uint16_t>(list, at, count);
}
template <class R>
__device__ __forceinline__ Stored unpacked(const Words& words) {
  Stored stored;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e)
    stored.v[e] = static_cast<R>(words.v[e * static_cast<int>(sizeof(R)) / 4] >> 8 * sizeof(R) * e % 32);
  return stored;
}
template <bool kWhole, class R>
__device__ __forceinline__ void put(void* list, int64_t at, int count, const Stored& stored) {
  constexpr int kSize = sizeof(R);
  R* to = in_global(static_cast<R*>(list) + at);
  if constexpr (kWhole) {
    uint32_t words[kSize] = {};
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      words[e * kSize / 4] |= static_cast<uint32_t>(static_cast<R>(stored.v[e])) << 8 * kSize * e % 32;
    // Intrinsic, because the compiler would split an ordinary store to share its parts with other branches.
    if constexpr (kSize == 4) __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    if constexpr (kSize == 2) __stwb(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
    if constexpr (kSize == 1) __stwb(reinterpret_cast<unsigned*>(to), words[0]);
  } else {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      if (e < count) to[e] = static_cast<R>(stored.v[e]);
  }
}

// A lane's elements as numbers. Reads and writes take one branch for all of them.
struct Numbers {
  float v[kPerLane];
};
__device__ __forceinline__ Stored bits_of(const Numbers& x) {
  Stored bits;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) bits.v[e] = fusedamp::bits_of(x.v[e]);
  return bits;
}
template <DType kDType>
__device__ __forceinline__ Numbers widened(const Words& words) {
  const Stored stored = unpacked<std::conditional_t<kDType == DType::f32, uint32_t, uint16_t>>(words);
  Numbers x;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e)
    x.v[e] = kDType == DType::f32 ? float_of(stored.v[e]) : widen<float>(static_cast<uint16_t>(stored.v[e]), kDType);
  return x;
}
__device__ __forceinline__ Numbers widened(const Words& words, DType dtype) {
  if (dtype == DType::f32) return widened<DType::f32>(words);
  if (dtype == DType::bf16) return widened<DType::bf16>(words);
  return widened<DType::f16>(words);
}

// Computes the values to step from 16-bit weights and their masters or remainders.
template <DType kHalf, bool kSplit>
__device__ __forceinline__ Numbers joined(const Words& halves, const Words& masters) {
  const Stored half = unpacked<uint16_t>(halves);
  const Stored kept = kSplit ? unpacked<uint16_t>(masters) : unpacked<uint32_t>(masters);
  Numbers x;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const auto bits = static_cast<uint16_t>(half.v[e]);
    const auto remainder = static_cast<int16_t>(kept.v[e]);
    if (kSplit && kHalf == DType::bf16) {
      x.v[e] = bf16_joined(bits, remainder);
      continue;
    }
    const float weight = widen<float>(bits, kHalf);
    const float master = kSplit ? f16_joined(weight, remainder) : float_of(kept.v[e]);
    // A weight that differs from its rounded master was modified: the master is updated; a split one is by
    // construction.
    const auto rounded = narrow<uint16_t>(master, kHalf);
    const float other = kSplit ? weight : followed(master, rounded, bits, kHalf);
    x.v[e] = rounded == bits ? master : other;
  }
  return x;
}
__device__ __forceinline__ Numbers weights_of(const StepRow& row, const Words& params, const Words& masters) {
  if (!row.master) return widened(params, row.param_dtype);
  const bool split = row.master_dtype == DType::i16;
  if (row.param_dtype == DType::bf16)
    return split ? joined<DType::bf16, true>(params, masters) : joined<DType::bf16, false>(params, masters);
  return split ? joined<DType::f16, true>(params, masters) : joined<DType::f16, false>(params, masters);
}

// Random numbers of a chunk, in shared memory: each warp has its own copy.
struct Draws {
  RandomKey keys[kWeightList + 1];  // of each list
  uint32_t shift;                   // of the elements' quads in the whole tensor
};
// Of a shard of columns, or one that cuts quads of elements or has several keys: every element takes a word of its own.
struct CutDraws {
  uint64_t stream;
  int64_t end, shift;  // elements below `end` are in the chunk's first run: `shift` before their index in the whole
  int64_t next;        // index in the whole of the run after it
};

// True if a lane's elements are a quad of the whole tensor, and the first chunk's keys serve all of them.
inline bool draws_in_quads(const StepRow& row) {
  const Placement& place = row.place;
  return is_whole(place) || (place.run == 0 && place.first % kQuad == 0 && place.first + row.numel <= kKeyElements);
}

// The first lanes write `draws`; the others see it after the next __syncwarp.
__device__ __forceinline__ void prepare(const StepRow& row, uint64_t stream, int64_t first, int lane, Draws& draws) {
  if (lane > kWeightList) return;
  draws.keys[lane] = random_key(stream, lane, row.place.first + first);
  if (lane == 0) draws.shift = static_cast<uint32_t>(row.place.first / kQuad);
}
__device__ __forceinline__ void prepare(const StepRow& row, uint64_t stream, int64_t first, int lane, CutDraws& draws) {
  if (lane > 0) return;
  const Placement& place = row.place;
  draws.stream = stream;
  draws.end = place.run == 0 ? INT64_MAX : (first / place.run + 1) * place.run;
  draws.shift = whole_index(place, first) - first;
  draws.next = place.run == 0 ? 0 : place.first + draws.end / place.run * place.stride;
}

// whole_index() of an element of the chunk, by a division of 32 bits, which needs fewer registers.
__device__ __forceinline__ int64_t index_of(const Placement& place, const CutDraws& draws, int64_t at) {
  if (at < draws.end) return at + draws.shift;
  const auto over = static_cast<uint32_t>(at - draws.end);  // below the size of a chunk
  const auto run = static_cast<uint32_t>(min(place.run, int64_t{1} << 31));
  return draws.next + int64_t{over / run} * place.stride + over % run;
}

// 16 random bits per element from `at`, a multiple of kPerLane.
__device__ __forceinline__ Stored draw(const StepRow&, const Draws& draws, int list, int64_t at) {
  static_assert(kPerLane == kQuad, "a lane's elements share a random word");
  const uint32_t word = random_word(draws.keys[list], static_cast<uint32_t>(at / kQuad) + draws.shift);
  Stored random;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) random.v[e] = random_part(word, e, list);
  return random;
}
__device__ __forceinline__ Stored draw(const StepRow& row, const CutDraws& draws, int list, int64_t at) {
  Stored random;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const int64_t index = index_of(row.place, draws, at + e);
    const uint32_t word = random_word(random_key(draws.stream, list, index), static_cast<uint32_t>(index / kQuad));
    random.v[e] = random_part(word, static_cast<int>(index % kQuad), list);
  }
  return random;
}

template <bool kWhole, DType kHalf, class D>
__device__ __forceinline__ void put_halves(const StepRow& row, int64_t at, int count, const Numbers& weight,
                                           bool stochastic, const D& draws) {
  Stored half;
  if (row.master && row.master_dtype == DType::i16) {
    Stored remainder;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const float x = weight.v[e];
      if (kHalf == DType::bf16) {
        half.v[e] = float_to_bf16_away(x);
        remainder.v[e] = static_cast<uint16_t>(bf16_remainder(x));
      } else {
        const auto bits = narrow<uint16_t>(x, DType::f16);
        half.v[e] = bits;
        remainder.v[e] = static_cast<uint16_t>(f16_remainder(x, widen<float>(bits, DType::f16)));
      }
    }
    put<kWhole, uint16_t>(row.master, at, count, remainder);
  } else if (stochastic && !row.master) {
    const Stored random = draw(row, draws, kWeightList, at);
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      half.v[e] =
          kHalf == DType::bf16 ? float_to_bf16(weight.v[e], random.v[e]) : float_to_f16(weight.v[e], random.v[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) half.v[e] = narrow<uint16_t>(weight.v[e], kHalf);
    if (row.master) put<kWhole, uint32_t>(row.master, at, count, bits_of(weight));
  }
  put<kWhole, uint16_t>(row.param, at, count, half);
}
template <bool kWhole, class D>
__device__ __forceinline__ void put_weights(const StepRow& row, int64_t at, int count, const Numbers& weight,
                                            bool stochastic, const D& draws) {
  if (row.param_dtype == DType::f32) return put<kWhole, uint32_t>(row.param, at, count, bits_of(weight));
  if (row.param_dtype == DType::bf16) return put_halves<kWhole, DType::bf16>(row, at, count, weight, stochastic, draws);
  put_halves<kWhole, DType::f16>(row, at, count, weight, stochastic, draws);
}

template <bool kNonNegative>
__device__ __forceinline__ Numbers states_of(const Words& words, DType dtype, float scale) {
  if (!is_8bit(dtype)) return widened(words, dtype);
  const Stored codes = unpacked<CodeOf<kNonNegative>>(words);
  Numbers x;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) x.v[e] = Codes<kNonNegative>::template value<0>(codes.v[e], scale);
  return x;
}

// All lanes of the warp must call it.
template <bool kWhole, bool kNonNegative, class D>
__device__ __forceinline__ void put_states(const StepRow& row, int j, int64_t at, int count, const Numbers& state,
                                           const D& draws, float* scale_at) {
  void* const list = row.states[j];
  const DType dtype = row.state_dtype;
  if (dtype == DType::f32) return put<kWhole, uint32_t>(list, at, count, bits_of(state));
  const Stored random = draw(row, draws, j, at);
  Stored stored;
  if (dtype == DType::bf16) {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) stored.v[e] = float_to_bf16(state.v[e], random.v[e]);
    return put<kWhole, uint16_t>(list, at, count, stored);
  }
  uint32_t largest = 0;  // as integers, NaN > infinity > finite
#pragma unroll
  for (int e = 0; e < kPerLane; ++e)
    if (e < count) largest = max(largest, fusedamp::bits_of(state.v[e]) & 0x7fffffffu);
  largest = warp_max(largest);
  const float scale = Codes<kNonNegative>::scale(largest), inverse = Codes<kNonNegative>::inverse(scale);
  if (threadIdx.x % 32 == 0) *scale_at = scale;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e)
    stored.v[e] =
        scale == scale ? Codes<kNonNegative>::code(state.v[e], inverse, random.v[e]) : Codes<kNonNegative>::kZero;
  put<kWhole, uint8_t>(list, at, count, stored);
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

// act(weight, gradient, states) for a lane's elements of one scale block; the results are stored where Action::kStores,
// and told to act.tally() where Action::kTallies. All lanes of the warp must call it.
template <bool kWhole, class Rule, class Action, class D>
__device__ __forceinline__ void visit_lane(const StepRow& row, void* const& grads, int64_t at, int left, Action& act,
                                           const D& draws) {
  constexpr int kStates = kStateRoom<Rule>;
  const int count = kWhole || left > kPerLane ? kPerLane : left < 0 ? 0 : left;
  const int64_t block = at / kScaleBlock;

  const StepRow lists = row;  // loads all addresses before the accesses that need them
  const Words grad_words = fetch<kWhole>(grads, lists.grad_dtype, at, count);
  const Words param_words = fetch<kWhole>(lists.param, lists.param_dtype, at, count);
  Words master_words = {}, state_words[kStates];
  float scales[kStates];
  if (lists.master) master_words = fetch<kWhole>(lists.master, lists.master_dtype, at, count);
  for_each_state<Rule>([&](auto j) {
    state_words[j] = fetch<kWhole>(lists.states[j], lists.state_dtype, at, count);
    scales[j] = lists.state_dtype == DType::i8 ? lists.scales[j][block] : 0.0f;
  });
  __syncwarp();  // all lanes have read the scale before one writes it, and see the keys

  const Numbers grad = widened(grad_words, lists.grad_dtype);
  Numbers weight = weights_of(lists, param_words, master_words), state[kStates];
  for_each_state<Rule>(
      [&](auto j) { state[j] = states_of<kNeverNegative<Rule, j>>(state_words[j], lists.state_dtype, scales[j]); });
  const Numbers old = weight;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    if (!Action::kStores && e >= count) break;
    float s[kStates];
    for_each_state<Rule>([&](auto j) { s[j] = state[j].v[e]; });
    act(weight.v[e], grad.v[e], s);
    for_each_state<Rule>([&](auto j) { state[j].v[e] = s[j]; });
  }
  if constexpr (!Action::kStores) return;
  if constexpr (Action::kTallies) act.tally(lists, param_words, old, weight, count);
  // Through `row`: addresses are read again instead of occupying registers.
  put_weights<kWhole>(row, at, count, weight, row.stochastic, draws);
  for_each_state<Rule>([&](auto j) {
    put_states<kWhole, kNeverNegative<Rule, j>>(row, j, at, count, state[j], draws, row.scales[j] + block);
  });
}

// The elements of one chunk. D: Draws or CutDraws.
template <class D, class Rule, class Action>
__device__ __forceinline__ void visit_compressed_chunk(const StepRow& row, void* const& grads, Span span, Action& act,
                                                       uint64_t stream) {
  constexpr int kBlockSize = static_cast<int>(kScaleBlock);
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  FUSEDAMP_SHARED(D, all_draws, kBlock / 32);
  D& draws = all_draws[warp];
  if constexpr (Action::kStores) {
    __syncwarp();  // the previous chunk's are no longer in use
    prepare(row, stream, span.first, lane, draws);
  }

  const bool aligned = is_aligned<Rule>(row, grads);
  for (int first = warp * kBlockSize; first < span.count; first += warps * kBlockSize) {
    const int in_block = lane * kPerLane, left = span.count - first;
    const int64_t at = span.first + first + in_block;
    if (aligned && left >= kBlockSize) {
      visit_lane<true, Rule>(row, grads, at, kPerLane, act, draws);
    } else {
      visit_lane<false, Rule>(row, grads, at, left - in_block, act, draws);
    }
  }
}

}  // namespace fusedamp::cuda
