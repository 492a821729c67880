// Shared by both parts of the emulation: runtime.cpp runs fibers, meeting.cpp synchronizes them.
#pragma once
#include <random>
#include <vector>

#include "cuda_emulation.h"

#define HOOK extern "C" __attribute__((weak))
HOOK void __tsan_acquire(void*);
HOOK void __tsan_release(void*);

namespace emulation {

enum State { kReady, kAtBarrier, kAtWarpOp, kExited };

constexpr unsigned kMostAtomics = 80;  // a table of 64 bins, and what else there is

struct Fiber : Thread {
  void* stack_pointer;
  char* stack;
  unsigned index, lane;
  State state;
  Place place;  // where it waits
  Vote vote;    // and with what
  bool predicate;
  WarpOp op;
  unsigned mask;
  int argument, width;
  uint64_t value, result;
  void *asan_stack, *tsan;
  bool fenced;             // whether it executed a fence
  unsigned pending_count;  // addresses of atomics since its last fence
  void* pending[kMostAtomics];
};

constexpr unsigned kMaxWarps = 32;

// Represents a block's barriers for ThreadSanitizer. A new one per block, because blocks are unordered.
struct SyncPoints {
  long block[2], warp[kMaxWarps][2];
};

struct Block {  // the one that runs
  SyncPoints* sync;
  unsigned alive, barrier_count;
  unsigned warp_sync_count[kMaxWarps], warp_waiting[kMaxWarps], warp_exited[kMaxWarps];
};

enum Schedule { kInOrder, kReversed, kShuffled, kPreemptive };

extern std::vector<Fiber> fibers;
extern Block block;
extern int schedule;
extern std::mt19937_64 random_bits;

inline Fiber* self() { return static_cast<Fiber*>(current); }
inline unsigned threads() { return static_cast<unsigned>(fibers.size()); }
inline void acquire(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}
inline void release(void* p) {
  if (__tsan_release) __tsan_release(p);
}

void switch_to_main(Fiber* f, bool for_good);
void try_release_barrier();

}  // namespace emulation
