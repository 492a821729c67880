// Random bits as a function of (seed, step, list, element) only: runs are reproducible and resume bit for bit, on any
// device, in any order. Keys: the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
// number generators"). Elements: a 32-bit multiply-xorshift finalizer with the constants that C. Wellons found by
// search (2018, "Prospecting for hash functions", public domain), keyed before and inside, so that two steps don't
// permute each other's numbers.
#pragma once
#include "../include/fusedamp/rows.h"
#include "vocab.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

FUSEDAMP_FN uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Inputs of a tensor's random numbers of one step.
FUSEDAMP_FN uint64_t random_stream(int64_t seed, int64_t step) {
  return mix(mix(static_cast<uint64_t>(seed) + 0x9e3779b97f4a7c15u) + static_cast<uint64_t>(step));
}

struct RandomKey {
  uint32_t outer, inner;
};

constexpr int kWeightList = 3;  // states are lists 0, 1 and 2

// The key of one list of the tensor for the kKeyElements elements around `index`, which 2^32 words serve.
constexpr int64_t kKeyElements = int64_t{1} << 33;
FUSEDAMP_FN RandomKey random_key(uint64_t stream, int list, int64_t index) {
  const uint64_t lists = 4, which = static_cast<uint64_t>(index / kKeyElements) * lists + static_cast<uint64_t>(list);
  const uint64_t key = mix(stream ^ ((which + 1) * 0x9e3779b97f4a7c15u));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// What a Placement says.
FUSEDAMP_FN bool is_whole(const Placement& place) { return (place.first | place.run) == 0; }
FUSEDAMP_FN int64_t whole_index(const Placement& place, int64_t i) {
  return place.first + (place.run == 0 ? i : i / place.run * place.stride + i % place.run);
}

// 32 random bits for two adjacent elements: `pair` is the lower 32 bits of half of the even index.
FUSEDAMP_FN uint32_t random_bits(RandomKey key, uint32_t pair) {
  uint32_t x = pair ^ key.outer;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + key.inner) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// This element's 16 bits: the lower ones if its index is even.
FUSEDAMP_FN uint32_t random_half(uint32_t bits, int index) { return bits >> (index % 2 * 16) & 0xffffu; }

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
