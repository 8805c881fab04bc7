// Warp exchanges, __syncwarp and cp.async queues of the engine.
#include "engine_state.h"

namespace qlk::emulation {

namespace {

Record* open_record(const char* operation, unsigned mask, int warp, int bytes) {
  Record* unused = nullptr;
  for (Record& record : machine->records) {
    if (!record.open && record.readers == 0) {
      if (!unused) unused = &record;
      if (record.mask == 0) break;  // It and those behind it were never used.
    }
    if (!record.open || record.warp != warp || (record.mask & mask) == 0) continue;
    if (record.mask != mask || record.operation != operation || record.bytes != bytes)
      fail("%s with mask %08x meets %s with mask %08x", operation, mask, record.operation,
           record.mask);
    return &record;
  }
  if (!unused) fail("more than %d exchanges at once", kMaxRecords);
  unused->operation = operation;
  unused->mask = mask;
  unused->warp = warp;
  unused->bytes = bytes;
  unused->arrived = 0;
  unused->open = true;
  unused->sync = new_sync();
  return unused;
}

// Adds the running lane's input and returns when all lanes of the mask have added theirs.
Record* rendezvous(const char* operation, unsigned mask, const void* input, int bytes) {
  Fiber* self = running;
  const int warp = self->number / kWarpSize, lane = self->number % kWarpSize;
  if (!(mask >> lane & 1)) fail("%s with mask %08x lacks the lane itself", operation, mask);
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    const int number = warp * kWarpSize + i;
    if (number >= machine->n_threads || machine->fibers[number]->state == State::kExited)
      fail("%s waits for lane %d, which %s", operation, i,
           number >= machine->n_threads ? "does not exist" : "has ended");
  }
  Record* record = open_record(operation, mask, warp, bytes);
  copy_bytes(record->slots[lane], input, static_cast<size_t>(bytes));
  record->arrived |= 1u << lane;
  self->record = record;
  if (record->arrived == mask) {
    record->open = false;
    record->readers = __builtin_popcount(mask);
    for (int i = 0; i < kWarpSize; ++i)
      if (mask >> i & 1 && i != lane) make_ready(machine->fibers[warp * kWarpSize + i]);
    // The last to arrive need not be the first to go on.
    make_ready(self);
  } else {
    self->state = State::kInExchange;
  }
  to_scheduler();
  return record;
}

}  // namespace

void check_nobody_waits_for(const Fiber& fiber) {
  for (const Record& record : machine->records)
    if (record.open && record.warp == fiber.number / kWarpSize &&
        (record.mask >> (fiber.number % kWarpSize) & 1))
      fail("the thread ends while others wait for it in %s", record.operation);
}

void sync_warp(unsigned mask, int line) {
  (void)line;
  // Released before the last to arrive can wake the others.
  void* sync = open_record("__syncwarp", mask, running->number / kWarpSize, 0)->sync;
  release(sync);
  Record* record = rendezvous("__syncwarp", mask, nullptr, 0);
  acquire(sync);
  --record->readers;
}

Exchange::Exchange(const char* operation, unsigned mask, const void* input, int bytes)
    : record_(rendezvous(operation, mask, input, bytes)) {}

Exchange::~Exchange() { --static_cast<Record*>(record_)->readers; }

bool Exchange::read(int lane, void* out) const {
  const auto* record = static_cast<const Record*>(record_);
  if (!(record->mask >> lane & 1)) return false;
  copy_bytes(out, record->slots[lane], static_cast<size_t>(record->bytes));
  return true;
}

int lane_index() { return running->number % kWarpSize; }

void queue_copy(const AsyncCopy& copy) {
  Fiber* self = running;
  if (self->n_copies == kMaxCopies) fail("more than %d copies under way", kMaxCopies);
  self->copies[(self->first_copy + self->n_copies++) % kMaxCopies] = {copy, self->open_group};
}

void commit_copies() { ++running->open_group; }

bool next_completed_copy(int pending, AsyncCopy* copy) {
  Fiber* self = running;
  const QueuedCopy& oldest = self->copies[self->first_copy];
  if (self->n_copies == 0 || oldest.group >= self->open_group - pending) return false;
  *copy = oldest.copy;
  self->first_copy = (self->first_copy + 1) % kMaxCopies;
  --self->n_copies;
  return true;
}

}  // namespace qlk::emulation
