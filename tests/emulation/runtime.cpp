// The fibers behind cuda_emulation.h. Compiled without sanitizers; it tells AddressSanitizer and ThreadSanitizer about
// fibers, shared memory and synchronisation through their hooks, which are absent in a plain build.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define HOOK extern "C" __attribute__((weak))
HOOK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
HOOK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
HOOK void __asan_poison_memory_region(const volatile void*, size_t);
HOOK void __asan_unpoison_memory_region(const volatile void*, size_t);
HOOK void* __tsan_get_current_fiber();
HOOK void* __tsan_create_fiber(unsigned);
HOOK void __tsan_destroy_fiber(void*);
HOOK void __tsan_switch_to_fiber(void*, unsigned);
HOOK void __tsan_acquire(void*);
HOOK void __tsan_release(void*);

#if !defined(__x86_64__)
#error "the fiber switch below is written for x86-64"
#endif
extern "C" void emulation_switch(void** save_stack, void* to_stack);
asm(R"(.text
.globl emulation_switch
.type emulation_switch,@function
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulation_switch,.-emulation_switch
)");

namespace emulation {

Thread* current;

namespace {

enum State { kReady, kAtBarrier, kAtWarpOp, kExited };
const char* const kStateNames[] = {"ready", "at a block barrier", "at a warp function", "exited"};

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
  bool fenced;             // has it executed a fence?
  unsigned pending_count;  // atomics since its last fence
  void* pending[8];
};

constexpr size_t kStack = 128 << 10, kGuard = 4096, kShared = 8 << 10, kRedZone = 64;
constexpr unsigned kMaxWarps = 32;
constexpr int kInOrder = 0, kReversed = 1, kShuffled = 2, kPreemptive = 3;

// What ThreadSanitizer sees a block's barriers as. A fresh one for each block: nothing orders blocks.
struct SyncPoints {
  long block[2], warp[kMaxWarps][2];
};
SyncPoints sync_pool[4096];
unsigned sync_next;
SyncPoints* sync;
long grid_end;

std::vector<Fiber> fibers;
unsigned alive, barrier_count, warp_sync_count[kMaxWarps], warp_waiting[kMaxWarps], warp_exited[kMaxWarps];
char *stacks, *shared_memory;
size_t stacks_count, shared_used;
struct {
  const void* key;
  char* array;
} shared_arrays[16];
unsigned shared_array_count;

void *main_stack_pointer, *main_asan_stack, *main_tsan;
const void* main_stack_bottom;
size_t main_stack_bytes;
void (*kernel_entry)(void*);
void* kernel_argument;
const char* kernel_name = "?";

uint64_t schedule_seed;
int schedule;
std::mt19937_64 random_bits;

Fiber* self() { return static_cast<Fiber*>(current); }
unsigned threads() { return static_cast<unsigned>(fibers.size()); }
bool under_tsan() { return __tsan_create_fiber != nullptr; }
void acquire(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}
void release(void* p) {
  if (__tsan_release) __tsan_release(p);
}

constexpr unsigned kNoHappensBefore = 1;  // switching fibers orders nothing: CUDA threads are unordered

void switch_to_main(Fiber* f, bool for_good) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &f->asan_stack, main_stack_bottom, main_stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(main_tsan, kNoHappensBefore);
  emulation_switch(&f->stack_pointer, main_stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(f->asan_stack, nullptr, nullptr);
}

void switch_to(Fiber* f) {
  current = f;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&main_asan_stack, f->stack, kStack);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(f->tsan, kNoHappensBefore);
  emulation_switch(&main_stack_pointer, f->stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(main_asan_stack, nullptr, nullptr);
  current = nullptr;
}

void fiber_main() {
  Fiber* f = self();
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &main_stack_bottom, &main_stack_bytes);
  kernel_entry(kernel_argument);
  release(&grid_end);
  f->state = kExited;
  --alive;
  warp_exited[f->index / 32] |= 1u << f->lane;
  switch_to_main(f, true);
  abort();
}

// Fresh pages: ThreadSanitizer forgets what the block before did there.
char* map_pages(char* at, size_t bytes) {
  const int fixed = at ? MAP_FIXED : 0;
  void* p = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
  if (p == MAP_FAILED) fail("no memory for %zu bytes", bytes);
  return static_cast<char*>(p);
}

void map_stacks() {
  constexpr size_t each = kStack + kGuard;
  if (stacks && stacks_count >= threads() && !under_tsan()) return;
  if (stacks && stacks_count < threads()) {
    munmap(stacks, stacks_count * each);
    stacks = nullptr;
  }
  stacks_count = std::max<size_t>(stacks_count, threads());
  stacks = map_pages(stacks, stacks_count * each);
  for (size_t i = 0; i < stacks_count; ++i) mprotect(stacks + i * each, kGuard, PROT_NONE);
}

void map_shared_memory() {
  if (!shared_memory || under_tsan()) shared_memory = map_pages(shared_memory, kShared);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(shared_memory, kShared);
  std::fill_n(shared_memory, kShared, static_cast<char>(0xff));
  if (__asan_poison_memory_region) __asan_poison_memory_region(shared_memory, kShared);
  shared_array_count = 0;
  shared_used = 0;
}

// Everybody alive waits at a barrier: let them go on, if it is the same one.
void try_release_barrier() {
  unsigned waiting = 0;
  const Fiber* first = nullptr;
  for (const Fiber& f : fibers) {
    if (f.state != kAtBarrier) continue;
    ++waiting;
    if (!first) first = &f;
  }
  if (!first || waiting != alive) return;
  if (alive != threads())
    fail("%u threads left the kernel before the block barrier at %s:%d", threads() - alive, first->place.file,
         first->place.line);
  int count = 0;
  for (const Fiber& f : fibers) {
    if (f.place.line != first->place.line || f.place.file != first->place.file || f.vote != first->vote)
      fail("threads wait at different barriers: %s:%d and %s:%d", first->place.file, first->place.line, f.place.file,
           f.place.line);
    count += f.predicate;
  }
  const bool all = count == static_cast<int>(threads());
  const int result = first->vote == Vote::kOr ? count > 0 : first->vote == Vote::kAnd ? all : count;
  for (Fiber& f : fibers) {
    f.state = kReady;
    f.result = static_cast<uint64_t>(result);
  }
  ++barrier_count;
}

// All lanes that the mask names have arrived: hand out the results.
void complete_warp_op(Fiber* warp, unsigned lanes, const Fiber& by) {
  const WarpOp op = by.op;
  const unsigned mask = by.mask, warp_index = by.index / 32;
  unsigned ballot = 0;
  for (unsigned l = 0; l < lanes; ++l)
    if (mask >> l & 1) ballot |= static_cast<unsigned>(warp[l].value != 0) << l;
  for (unsigned l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    Fiber& f = warp[l];
    const long lane = l, segment = lane / f.width * f.width, end = segment + f.width;
    long source = lane;
    switch (op) {
      case WarpOp::kIndex: source = segment + (f.argument & (f.width - 1)); break;
      case WarpOp::kUp: source = lane - f.argument < segment ? lane : lane - f.argument; break;
      case WarpOp::kDown: source = lane + f.argument >= end ? lane : lane + f.argument; break;
      case WarpOp::kXor: source = (lane ^ f.argument) >= end ? lane : lane ^ f.argument; break;
      case WarpOp::kBallot: f.result = ballot; break;
      case WarpOp::kAny: f.result = ballot != 0; break;
      case WarpOp::kAll: f.result = ballot == (mask & (lanes == 32 ? ~0u : (1u << lanes) - 1)); break;
      case WarpOp::kSync: f.result = 0; break;
    }
    if (op <= WarpOp::kXor) {
      if (source < 0 || source >= static_cast<long>(lanes) || !(mask >> source & 1))
        fail("lane %u shuffles from lane %ld, which mask 0x%08x does not name (%s:%d)", l, source, mask, f.place.file,
             f.place.line);
      f.result = warp[source].value;
    }
    f.state = kReady;
    --warp_waiting[warp_index];
  }
  if (op == WarpOp::kSync) ++warp_sync_count[warp_index];
}

void start_fiber(unsigned i, uint3 block_index, dim3 blocks) {
  Fiber& f = fibers[i];
  f = Fiber();
  f.thread_index = {i, 0, 0};
  f.block_index = block_index;
  f.block_size = dim3(threads());
  f.grid_size = blocks;
  f.index = i;
  f.lane = i % 32;
  f.stack = stacks + i * (kStack + kGuard) + kGuard;
  // Tops of stacks are staggered: all at the same offset of a page, they would compete for one set of the cache.
  auto** top = reinterpret_cast<void**>(f.stack + kStack - 64 - f.lane * 192);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);  // where the first switch returns to
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  f.stack_pointer = top;
}

void run_block(unsigned block, unsigned blocks) {
  map_stacks();
  map_shared_memory();
  sync = &sync_pool[sync_next++ % 4096];
  barrier_count = 0;
  std::fill_n(warp_waiting, kMaxWarps, 0u);
  std::fill_n(warp_exited, kMaxWarps, 0u);
  alive = threads();
  for (unsigned i = 0; i < threads(); ++i) start_fiber(i, {block, 0, 0}, dim3(blocks));
  static std::vector<unsigned> order;
  if (under_tsan()) {
    // It hands out thread numbers in order: shuffled, or thread t of two blocks would look like one thread.
    order.resize(threads());
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random_bits);
    for (const unsigned i : order) fibers[i].tsan = __tsan_create_fiber(0);
  }
  while (alive > 0) {
    order.clear();
    for (const Fiber& f : fibers)
      if (f.state == kReady) order.push_back(f.index);
    if (order.empty()) fail("deadlock: no thread of the block can go on");
    if (schedule == kReversed) std::reverse(order.begin(), order.end());
    if (schedule >= kShuffled) std::shuffle(order.begin(), order.end(), random_bits);
    for (const unsigned i : order)
      if (fibers[i].state == kReady) switch_to(&fibers[i]);
    try_release_barrier();
  }
  if (under_tsan())
    for (const Fiber& f : fibers) __tsan_destroy_fiber(f.tsan);
}

}  // namespace

void set_schedule(uint64_t seed) { schedule_seed = seed; }

void fail(const char* format, ...) {
  fprintf(stderr, "==EMULATION== kernel %s", kernel_name);
  if (current)
    fprintf(stderr, ", block %u, thread %u, schedule %llu", current->block_index.x, current->thread_index.x,
            static_cast<unsigned long long>(schedule_seed));
  fprintf(stderr, ": ");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  std::map<std::string, unsigned> where;
  for (const Fiber& f : fibers) {
    std::string text = kStateNames[f.state];
    if (f.state == kAtBarrier || f.state == kAtWarpOp)
      text += std::string(" ") + f.place.file + ":" + std::to_string(f.place.line);
    ++where[text];
  }
  for (const auto& [text, count] : where) fprintf(stderr, "  %5u threads %s\n", count, text.c_str());
  fflush(stderr);
  abort();
}

void may_switch() {
  if (current && schedule == kPreemptive && random_bits() % 4 == 0) switch_to_main(self(), false);
}

// The C++ rule: what precedes a fence that precedes an atomic by one thread happens before what follows a fence that
// follows an atomic on the same address by another. Nothing less orders anything.
void after_atomic(void* address) {
  Fiber* f = self();
  if (!f || !under_tsan()) return;
  if (f->fenced) release(address);
  for (unsigned i = 0; i < f->pending_count; ++i)
    if (f->pending[i] == address) return;
  if (f->pending_count == 8) fail("more than 8 atomics between two fences");
  f->pending[f->pending_count++] = address;
}

void fence() {
  may_switch();
  Fiber* f = self();
  f->fenced = true;
  for (unsigned i = 0; i < f->pending_count; ++i) acquire(f->pending[i]);
  f->pending_count = 0;
}

int barrier(Vote vote, bool predicate, Place place) {
  Fiber* f = self();
  f->vote = vote;
  f->predicate = predicate;
  f->place = place;
  f->state = kAtBarrier;
  void* point = &sync->block[barrier_count & 1];
  release(point);
  switch_to_main(f, false);
  acquire(point);
  return static_cast<int>(f->result);
}

uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Place place) {
  Fiber* f = self();
  const unsigned w = f->index / 32, lanes = std::min(32u, threads() - w * 32);
  const unsigned named = mask & (lanes == 32 ? ~0u : (1u << lanes) - 1), gone = warp_exited[w] & mask;
  if (!(mask >> f->lane & 1))
    fail("lane %u calls a warp function whose mask 0x%08x does not name it (%s:%d)", f->lane, mask, place.file,
         place.line);
  if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle width %d (%s:%d)", width, place.file, place.line);
  if (gone)
    fail("mask 0x%08x names lane %d, which has left the kernel (%s:%d)", mask, __builtin_ctz(gone), place.file,
         place.line);
  f->op = op;
  f->mask = mask;
  f->value = value;
  f->argument = argument;
  f->width = width;
  f->place = place;
  f->state = kAtWarpOp;
  void* point = &sync->warp[w][warp_sync_count[w] & 1];
  if (op == WarpOp::kSync) release(point);  // shuffles and votes order no memory

  Fiber* warp = &fibers[w * 32];
  bool all_here = ++warp_waiting[w] >= static_cast<unsigned>(__builtin_popcount(named));
  for (unsigned l = 0; l < lanes && all_here; ++l) {
    if (!(mask >> l & 1)) continue;
    const Fiber& other = warp[l];
    if (other.state != kAtWarpOp || other.mask != mask) {
      all_here = false;
    } else if (other.op != op || other.place.line != place.line || other.place.file != place.file) {
      fail("lanes of mask 0x%08x meet in different calls: %s:%d and %s:%d", mask, place.file, place.line,
           other.place.file, other.place.line);
    }
  }
  if (all_here) complete_warp_op(warp, lanes, *f);
  if (!all_here || (schedule >= kShuffled && random_bits() % 2)) switch_to_main(f, false);
  if (op == WarpOp::kSync) acquire(point);
  return f->result;
}

// Allocates nothing: it runs on a fiber, whose memory ThreadSanitizer would call unordered with the next block's.
void* shared_array(const void* key, size_t bytes, size_t alignment) {
  for (unsigned i = 0; i < shared_array_count; ++i)
    if (shared_arrays[i].key == key) return shared_arrays[i].array;
  const size_t at = (shared_used + kRedZone + alignment - 1) / alignment * alignment;
  if (at + bytes + kRedZone > kShared || shared_array_count == 16)
    fail("more than %zu bytes of shared memory", kShared);
  shared_used = at + bytes;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(shared_memory + at, bytes);
  shared_arrays[shared_array_count++] = {key, shared_memory + at};
  return shared_memory + at;
}

void run_grid(const char* name, unsigned blocks, unsigned threads_per_block, void (*entry)(void*), void* argument) {
  kernel_name = name;
  if (threads_per_block == 0 || threads_per_block > 1024 || blocks == 0)
    fail("invalid launch: %u blocks of %u threads", blocks, threads_per_block);
  fibers.resize(threads_per_block);
  kernel_entry = entry;
  kernel_argument = argument;
  random_bits.seed(schedule_seed);
  schedule = static_cast<int>(schedule_seed % 4);
  if (__tsan_get_current_fiber) main_tsan = __tsan_get_current_fiber();
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule == kReversed) std::reverse(order.begin(), order.end());
  if (schedule >= kShuffled) std::shuffle(order.begin(), order.end(), random_bits);
  for (const unsigned block : order) run_block(block, blocks);
  acquire(&grid_end);
}

}  // namespace emulation
