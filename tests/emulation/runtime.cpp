// The fibers behind cuda_emulation.h. Compiled without sanitizers; it tells AddressSanitizer and ThreadSanitizer about
// fibers, shared memory and synchronization through their hooks, which are absent in a plain build.
#include "fibers.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

HOOK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
HOOK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
HOOK void __asan_poison_memory_region(const volatile void*, size_t);
HOOK void __asan_unpoison_memory_region(const volatile void*, size_t);
HOOK void* __tsan_get_current_fiber();
HOOK void* __tsan_create_fiber(unsigned);
HOOK void __tsan_destroy_fiber(void*);
HOOK void __tsan_switch_to_fiber(void*, unsigned);

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
std::vector<Fiber> fibers;
Block block;
int schedule;
std::mt19937_64 random_bits;

namespace {

long grid_end;  // orders a grid before later work

const char* const kStateNames[] = {"ready", "at a block barrier", "at a warp function", "exited"};

constexpr size_t kStack = 128 << 10, kGuard = 4096, kShared = 8 << 10, kRedZone = 64;

SyncPoints sync_pool[4096];
unsigned sync_next;

char *stacks, *shared_memory;
size_t stacks_count, shared_used;
struct {
  const void* key;
  char* array;
} shared_arrays[16];
unsigned shared_array_count;
constexpr unsigned kMostKernels = 1024;
const void* launched[kMostKernels];
unsigned launched_count;
constexpr unsigned kLongestLog = 1024;
const char* launch_log[kLongestLog];
unsigned launch_log_length;

void *main_stack_pointer, *main_asan_stack, *main_tsan;
const void* main_stack_bottom;
size_t main_stack_bytes;
void (*kernel_entry)(void*);
void* kernel_argument;
const char* kernel_name = "?";

uint64_t schedule_seed;

bool under_tsan() { return __tsan_create_fiber != nullptr; }

constexpr unsigned kNoHappensBefore = 1;  // switching fibers orders nothing: CUDA threads are unordered

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
  --block.alive;
  block.warp_exited[f->index / 32] |= 1u << f->lane;
  switch_to_main(f, true);
  abort();
}

// Fresh pages, so that ThreadSanitizer forgets accesses by the previous block.
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

void run_block(unsigned index, unsigned blocks) {
  map_stacks();
  map_shared_memory();
  block.sync = &sync_pool[sync_next++ % 4096];
  block.barrier_count = 0;
  std::fill_n(block.warp_waiting, kMaxWarps, 0u);
  std::fill_n(block.warp_exited, kMaxWarps, 0u);
  block.alive = threads();
  for (unsigned i = 0; i < threads(); ++i) start_fiber(i, {index, 0, 0}, dim3(blocks));
  static std::vector<unsigned> order;
  if (under_tsan()) {
    // It hands out thread numbers in order: shuffled, or thread t of two blocks would look like one thread.
    order.resize(threads());
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random_bits);
    for (const unsigned i : order) fibers[i].tsan = __tsan_create_fiber(0);
  }
  while (block.alive > 0) {
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

void switch_to_main(Fiber* f, bool for_good) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &f->asan_stack, main_stack_bottom, main_stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(main_tsan, kNoHappensBefore);
  emulation_switch(&f->stack_pointer, main_stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(f->asan_stack, nullptr, nullptr);
}

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

// Allocates nothing either: ThreadSanitizer did not see a race of main's after that.
void note(const void* kernel) {
  for (unsigned i = 0; i < launched_count; ++i)
    if (launched[i] == kernel) return;
  if (launched_count == kMostKernels) fail("more than %u kernels", kMostKernels);
  launched[launched_count++] = kernel;
}

void forget_launches() { launch_log_length = 0; }

unsigned launches(const char* const** names) {
  *names = launch_log;
  return launch_log_length;
}

void print_launched(const void* origin) {
  for (unsigned i = 0; i < launched_count; ++i)
    printf("ran %td\n", static_cast<const char*>(launched[i]) - static_cast<const char*>(origin));
}

void run_grid(const char* name, unsigned blocks, unsigned threads_per_block, void (*entry)(void*), void* argument) {
  kernel_name = name;
  if (launch_log_length < kLongestLog) launch_log[launch_log_length++] = name;
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
  for (const unsigned index : order) run_block(index, blocks);
  acquire(&grid_end);
}

}  // namespace emulation
