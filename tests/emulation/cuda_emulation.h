// Compiles the project's CUDA kernels with a host C++ compiler and runs them on the CPU. One CUDA thread is one fiber;
// the fibers of a block meet in barriers and warp functions; the blocks of a grid run one after another, in a shuffled
// order. Anything not declared here (inline PTX, cub, approximate intrinsics, <<<>>>) does not compile: kernels must
// not use it. README.md lists what this cannot detect.
#pragma once
#include <cuda_runtime_api.h>  // dim3, cudaStream_t: declarations only, nothing of CUDA is linked
#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

namespace emulation {

struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
};
extern Thread* current;  // all fibers live on one OS thread

enum class Vote { kNone, kOr, kAnd, kCount };
enum class WarpOp { kIndex, kUp, kDown, kXor, kBallot, kAny, kAll, kSync };

struct Place {  // of a call in the kernels' source
  const char* file;
  int line;
};

// runtime.cpp
int barrier(Vote vote, bool predicate, Place place);
uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Place place);
void* shared_array(const void* key, size_t bytes, size_t alignment);
void fence();
void may_switch();                 // a possible switch to another thread of the block
void after_atomic(void* address);  // bookkeeping for ThreadSanitizer
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void run_grid(const char* name, unsigned blocks, unsigned threads, void (*entry)(void*), void* argument);
void note(const void* kernel);  // that it was launched
void forget_launches();
unsigned launches(const char* const** names);  // since then, in order: their number and names
void print_launched(const void* origin);       // "ran", and how far from there each kernel that was launched lies
void set_schedule(uint64_t seed);              // order of threads and blocks, and preemption

template <class Tag>
inline char shared_key = 0;
// Shared memory, new for each block and full of 0xFF (NaN). A closure's type tells the call site and the instance.
template <class T, class Tag>
T& shared(Tag) {
  return *static_cast<T*>(shared_array(&shared_key<Tag>, sizeof(T), std::max<size_t>(alignof(T), 16)));
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "not a register's content");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Relaxed, as in CUDA: only fences and barriers order other memory.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  using Word = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("misaligned atomic at %p", static_cast<void*>(address));
  may_switch();
  Word* word = reinterpret_cast<Word*>(address);
  Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, static_cast<Word>(to_bits(update(from_bits<T>(old)))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return from_bits<T>(old);
}

}  // namespace emulation

#define threadIdx (emulation::current->thread_index)
#define blockIdx (emulation::current->block_index)
#define blockDim (emulation::current->block_size)
#define gridDim (emulation::current->grid_size)
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__  // a kernel that used it directly would share it between blocks; FUSEDAMP_SHARED does not

#define FUSEDAMP_SHARED(T, name, count) T(&name)[count] = emulation::shared<T[count]>([] {})

#define EMULATION_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATION_BARRIER(name, vote) \
  inline int name(int predicate, EMULATION_PLACE) { return emulation::barrier(vote, predicate, {file, line}); }
inline void __syncthreads(EMULATION_PLACE) { emulation::barrier(emulation::Vote::kNone, false, {file, line}); }
EMULATION_BARRIER(__syncthreads_or, emulation::Vote::kOr)
EMULATION_BARRIER(__syncthreads_and, emulation::Vote::kAnd)
EMULATION_BARRIER(__syncthreads_count, emulation::Vote::kCount)

inline void __syncwarp(unsigned mask = ~0u, EMULATION_PLACE) {
  emulation::warp_op(emulation::WarpOp::kSync, mask, 0, 0, 32, {file, line});
}
#define EMULATION_SHUFFLE(name, op)                                                              \
  template <class T>                                                                             \
  T name(unsigned mask, T value, int argument, int width = 32, EMULATION_PLACE) {                \
    return emulation::from_bits<T>(                                                              \
        emulation::warp_op(op, mask, emulation::to_bits(value), argument, width, {file, line})); \
  }
EMULATION_SHUFFLE(__shfl_sync, emulation::WarpOp::kIndex)
EMULATION_SHUFFLE(__shfl_up_sync, emulation::WarpOp::kUp)
EMULATION_SHUFFLE(__shfl_down_sync, emulation::WarpOp::kDown)
EMULATION_SHUFFLE(__shfl_xor_sync, emulation::WarpOp::kXor)
#define EMULATION_VOTE(Result, name, op)                                                           \
  inline Result name(unsigned mask, int predicate, EMULATION_PLACE) {                              \
    return static_cast<Result>(emulation::warp_op(op, mask, predicate != 0, 0, 32, {file, line})); \
  }
EMULATION_VOTE(unsigned, __ballot_sync, emulation::WarpOp::kBallot)
EMULATION_VOTE(int, __any_sync, emulation::WarpOp::kAny)
EMULATION_VOTE(int, __all_sync, emulation::WarpOp::kAll)

inline void __threadfence() { emulation::fence(); }

template <class T>
T atomicAdd(T* address, T value) {
  return emulation::atomic_update(address, [=](T old) -> T { return old + value; });
}
template <class T>
T atomicMax(T* address, T value) {
  return emulation::atomic_update(address, [=](T old) -> T { return std::max(old, value); });
}
template <class T>
T atomicExch(T* address, T value) {
  return emulation::atomic_update(address, [=](T) -> T { return value; });
}

// Loads that bypass the L1 cache, which a kernel needs to see another block's results. Not atomic.
template <class T>
T __ldcg(const T* address) {
  return *address;
}
// An ordinary store, which nvcc leaves in one piece.
template <class T>
void __stwb(T* address, T value) {
  *address = value;
}

using std::max;
using std::min;

namespace fusedamp::cuda {

// The same constants as on a GPU unless the test shrinks them, to get many chunks and packets from little data.
#ifndef EMULATED_BLOCK
#define EMULATED_BLOCK 256
#define EMULATED_CHUNK 16384
#define EMULATED_PACKET_WORDS 4000
#endif
constexpr int kBlock = EMULATED_BLOCK;
constexpr int64_t kChunk = EMULATED_CHUNK;
constexpr int kPacketWords = EMULATED_PACKET_WORDS, kSmallPacketWords = kPacketWords * 12 / 100;

template <class T>
T* in_global(T* address) {
  return address;
}

inline uint32_t warp_max(uint32_t x) {
  for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

template <class... Parameters>
int resident_blocks(void (*)(Parameters...)) {
  return 8;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
            const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call = {kernel, {arguments...}};
  emulation::note(reinterpret_cast<const void*>(kernel));
  emulation::run_grid(
      name, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
      [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); }, &call);
}

}  // namespace fusedamp::cuda
