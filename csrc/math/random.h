// Random bits as a function of (seed, step, list, element) only: runs are reproducible and resume bit for bit, on any
// device, in any order. Keys: the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
// number generators"). Elements: a Weyl sequence through a 32-bit multiply-xorshift finalizer with constants that were
// found by search (C. Wellons and others 2018 to 2022, "Prospecting for hash functions", public domain), keyed before
// and inside, so that two steps don't permute each other's numbers.
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
constexpr int kQuad = 4;        // adjacent elements of a whole tensor that share a random word

// The key of one list of the tensor for the kKeyElements elements around `index`, which 2^32 words serve. Lists 0 and 1
// share their words.
constexpr int64_t kKeyElements = int64_t{kQuad} << 32;
FUSEDAMP_FN RandomKey random_key(uint64_t stream, int list, int64_t index) {
  const uint64_t lists = 4, words = static_cast<uint64_t>(list == 1 ? 0 : list);
  const uint64_t which = static_cast<uint64_t>(index / kKeyElements) * lists + words;
  const uint64_t key = mix(stream ^ ((which + 1) * 0x9e3779b97f4a7c15u));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// What a Placement says.
FUSEDAMP_FN bool is_whole(const Placement& place) { return (place.first | place.run) == 0; }
FUSEDAMP_FN int64_t whole_index(const Placement& place, int64_t i) {
  return place.first + (place.run == 0 ? i : i / place.run * place.stride + i % place.run);
}

// 32 random bits for four adjacent elements. `quad`: the lower 32 bits of a quarter of the first one's index.
template <class W>
FUSEDAMP_FN W random_word(RandomKey key, W quad) {
  W x = quad * 0x9e3779b1u + key.outer;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = ((x ^ (x >> 15)) + key.inner) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

// The 16 bits of element 0 to 3 of the four: two neighboring bytes of the word, which is a ring. List 1 takes the two
// bytes that list 0 leaves, so both lists of an element are independent; neighbors share a byte.
FUSEDAMP_FN uint32_t random_part(uint32_t word, int element, int list) {
  const int turn = (element + (list == 1 ? 2 : 0)) % kQuad * 8;
  return static_cast<uint32_t>(((static_cast<uint64_t>(word) << 32) | word) >> turn) & 0xffffu;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
