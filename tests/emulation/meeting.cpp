// Where the fibers of a block meet: barriers, warp functions, fences. Compiled without sanitizers, as runtime.cpp.
#include "fibers.h"

namespace emulation {

// All live threads wait at a barrier: continue them if it is the same one.
void try_release_barrier() {
  unsigned waiting = 0;
  const Fiber* first = nullptr;
  for (const Fiber& f : fibers) {
    if (f.state != kAtBarrier) continue;
    ++waiting;
    if (!first) first = &f;
  }
  if (!first || waiting != block.alive) return;
  if (block.alive != threads())
    fail("%u threads left the kernel before the block barrier at %s:%d", threads() - block.alive, first->place.file,
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
  ++block.barrier_count;
}

namespace {

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
    --block.warp_waiting[warp_index];
  }
  if (op == WarpOp::kSync) ++block.warp_sync_count[warp_index];
}

}  // namespace

// The C++ rule: what precedes a fence that precedes an atomic by one thread happens before what follows a fence that
// follows an atomic on the same address by another. Nothing less orders anything.
void after_atomic(void* address) {
  Fiber* f = self();
  if (!f || !__tsan_release) return;
  if (f->fenced) release(address);
  for (unsigned i = 0; i < f->pending_count; ++i)
    if (f->pending[i] == address) return;
  if (f->pending_count == kMostAtomics) fail("atomics on more than %u addresses between two fences", kMostAtomics);
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
  void* point = &block.sync->block[block.barrier_count & 1];
  release(point);
  switch_to_main(f, false);
  acquire(point);
  return static_cast<int>(f->result);
}

uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Place place) {
  Fiber* f = self();
  const unsigned w = f->index / 32, lanes = std::min(32u, threads() - w * 32);
  const unsigned named = mask & (lanes == 32 ? ~0u : (1u << lanes) - 1), gone = block.warp_exited[w] & mask;
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
  void* point = &block.sync->warp[w][block.warp_sync_count[w] & 1];
  if (op == WarpOp::kSync) release(point);  // shuffles and votes order no memory

  Fiber* warp = &fibers[w * 32];
  bool all_here = ++block.warp_waiting[w] >= static_cast<unsigned>(__builtin_popcount(named));
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

}  // namespace emulation
