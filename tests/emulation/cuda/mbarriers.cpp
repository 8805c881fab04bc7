// mbarriers, the copies that complete on them, and named barriers of the engine.
//
// A copy is made when a thread waits for its phase: as late as can be. Its destination has been
// poison since it was issued: a wait that is missing and a tile that is refilled too early both
// show in any order of the threads.
#include <cstdio>

#include "engine_state.h"

namespace qlk::emulation {

namespace {

// A phase announces at most this much ("Contents of the mbarrier object").
constexpr int64_t kMostBytes = (1 << 20) - 1;

int find_mbarrier(const void* address) {
  for (int i = 0; i < machine->n_mbarriers; ++i)
    if (machine->mbarriers[i].address == address) return i;
  fail("%p is no mbarrier: nobody initialised it", address);
}

bool lacks_only_copies(const Mbarrier& barrier) {
  return barrier.pending == 0 && barrier.expected == barrier.under_way;
}

void check_bytes(const Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.under_way > barrier.expected)
    fail("copies of %lld bytes complete on an mbarrier whose phase expects %lld",
         static_cast<long long>(barrier.under_way), static_cast<long long>(barrier.expected));
}

void begin_next_phase(int number) {
  Mbarrier& barrier = machine->mbarriers[number];
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.expected = barrier.under_way = 0;
  barrier.previous_sync = barrier.sync;
  barrier.sync = new_sync();
  wake(State::kAtMbarrier, number);
}

}  // namespace

void reset_mbarriers() {
  machine->n_mbarriers = machine->n_bulk_copies = 0;
  for (NamedBarrier& barrier : machine->named_barriers) barrier.arrived = 0;
}

void check_mbarriers_at_end() {
  if (machine->n_bulk_copies > 0)
    fail("block (%u, %u, %u) ends with %d bulk copies that nobody waited for", block_index.x,
         block_index.y, block_index.z, machine->n_bulk_copies);
}

void describe_mbarrier(const Fiber& fiber, char* text, size_t size) {
  const Mbarrier& barrier = machine->mbarriers[fiber.line];
  std::snprintf(text, size,
                "parity %u of the mbarrier at %u, in its phase %llu: %d of %d arrivals "
                "missing, %lld bytes expected, %lld under way",
                fiber.parity, window_address(barrier.address),
                static_cast<unsigned long long>(barrier.phase), barrier.pending, barrier.count,
                static_cast<long long>(barrier.expected),
                static_cast<long long>(barrier.under_way));
}

void mbarrier_init(const void* address, int arrivals) {
  if (!in_shared(address, 8) || window_address(address) % 8)
    fail("an mbarrier at %p: not 8 aligned bytes of shared memory", address);
  if (arrivals < 1 || arrivals >= 1 << 20) fail("an mbarrier of %d arrivals", arrivals);
  for (int i = 0; i < machine->n_mbarriers; ++i)
    if (machine->mbarriers[i].address == address)
      fail("the mbarrier at %u is initialised again", window_address(address));
  if (machine->n_mbarriers == kMaxMbarriers) fail("more than %d mbarriers", kMaxMbarriers);
  machine->mbarriers[machine->n_mbarriers++] = {address, arrivals,        arrivals,   0,      0, 0,
                                                false,   running->number, new_sync(), nullptr};
}

void fence_mbarrier_init() {
  for (int i = 0; i < machine->n_mbarriers; ++i)
    if (machine->mbarriers[i].initialised_by == running->number)
      machine->mbarriers[i].is_fenced = true;
}

void mbarrier_arrive(const void* address, uint32_t expected_bytes) {
  const int number = find_mbarrier(address);
  Mbarrier& barrier = machine->mbarriers[number];
  if (barrier.pending == 0)
    fail("more than %d arrivals in phase %llu of the mbarrier at %u", barrier.count,
         static_cast<unsigned long long>(barrier.phase), window_address(address));
  barrier.expected += expected_bytes;
  if (barrier.expected > kMostBytes)
    fail("a phase of an mbarrier expects %lld bytes", static_cast<long long>(barrier.expected));
  --barrier.pending;
  release(barrier.sync);
  check_bytes(barrier);
  if (barrier.pending == 0 && barrier.expected == 0)
    begin_next_phase(number);
  else if (lacks_only_copies(barrier))
    wake(State::kAtMbarrier, number);
  maybe_switch();
}

bool await_phase(const void* address, uint32_t parity) {
  const int number = find_mbarrier(address);
  if (parity > 1) fail("an mbarrier has no phase of parity %u", parity);
  maybe_switch();
  for (;;) {
    Mbarrier& barrier = machine->mbarriers[number];
    if ((barrier.phase & 1) != parity) {
      if (barrier.previous_sync) acquire(barrier.previous_sync);
      return false;
    }
    if (lacks_only_copies(barrier)) {
      acquire(barrier.sync);
      return true;
    }
    running->state = State::kAtMbarrier;
    running->line = number;
    running->parity = parity;
    to_scheduler();
  }
}

void end_phase(const void* address) {
  const int number = find_mbarrier(address);
  release(machine->mbarriers[number].sync);
  begin_next_phase(number);
}

void queue_bulk_copy(const BulkCopy& copy, const void* address) {
  const int number = find_mbarrier(address);
  Mbarrier& barrier = machine->mbarriers[number];
  if (!barrier.is_fenced)
    fail("a copy completes on the mbarrier at %u, whose init no fence_mbarrier_init followed",
         window_address(address));
  const auto* begin = static_cast<const unsigned char*>(copy.destination);
  for (int i = 0; i < machine->n_bulk_copies; ++i) {
    const BulkCopy& other = machine->bulk_copies[i].copy;
    const auto* there = static_cast<const unsigned char*>(other.destination);
    if (begin < there + other.bytes && there < begin + copy.bytes)
      fail("two copies to shared memory at %u are under way at once",
           window_address(copy.destination));
  }
  if (machine->n_bulk_copies == kMaxBulkCopies)
    fail("more than %d bulk copies under way", kMaxBulkCopies);
  QueuedBulkCopy& queued = machine->bulk_copies[machine->n_bulk_copies++];
  copy_bytes(&queued.copy, &copy, sizeof copy);
  queued.mbarrier = number;
  barrier.under_way += copy.bytes;
  // The poison is written before the data.
  release(barrier.sync);
  check_bytes(barrier);
  if (lacks_only_copies(barrier)) wake(State::kAtMbarrier, number);
  maybe_switch();
}

bool next_bulk_copy(const void* address, BulkCopy* copy) {
  const int number = find_mbarrier(address);
  Machine& m = *machine;
  for (int i = 0; i < m.n_bulk_copies; ++i) {
    if (m.bulk_copies[i].mbarrier != number) continue;
    copy_bytes(copy, &m.bulk_copies[i].copy, sizeof *copy);
    copy_bytes(&m.bulk_copies[i], &m.bulk_copies[--m.n_bulk_copies], sizeof m.bulk_copies[i]);
    return true;
  }
  return false;
}

void sync_named(int id, int threads) {
  if (id < 1 || id >= kNamedBarriers) fail("barrier %d: __syncthreads has 0, the last is 15", id);
  if (threads < kWarpSize || threads % kWarpSize || threads > machine->n_threads)
    fail("barrier %d of %d threads: not whole warps of the block", id, threads);
  NamedBarrier& barrier = machine->named_barriers[id];
  if (barrier.arrived > 0 && barrier.threads != threads)
    fail("barrier %d of %d threads meets itself with %d threads", id, threads, barrier.threads);
  if (barrier.arrived == 0) barrier.sync = new_sync();
  void* sync = barrier.sync;
  release(sync);
  barrier.threads = threads;
  running->state = State::kAtNamedBarrier;
  running->line = id;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    wake(State::kAtNamedBarrier, id);
  }
  to_scheduler();
  acquire(sync);
}

}  // namespace qlk::emulation
