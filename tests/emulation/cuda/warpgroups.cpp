// wgmma, register budgets and elections of the engine.
//
// The products of a wgmma are made when a thread waits for them or, in a random order of the
// threads, now and then as they are issued: a tile that is overwritten too early shows, and so does
// one that comes too late. Meanwhile the accumulators are NaN.
#include <cstdio>

#include "engine_state.h"

namespace qlk::emulation {

namespace {

constexpr int kRegisters = 64 << 10;
constexpr uint32_t kPoison = 0xffffffffu;

// The warps of a warpgroup issue the same: each one's list is compared with the others'. They need
// not do so at the same time here.
void log_wgmma(const char* operation, uint64_t argument) {
  if (running->number % kWarpSize != 0) return;
  const int warp = running->number / kWarpSize, group = warp / 4, first = group * 4;
  if ((first + 4) * kWarpSize > machine->n_threads)
    fail("%s by warp %d, whose warpgroup is not whole", operation, warp);
  const int number = machine->wgmmas_of_warp[warp]++;
  int most = 0, least = number;
  for (int w = first; w < first + 4; ++w) {
    if (w != warp && machine->wgmmas_of_warp[w] > most) most = machine->wgmmas_of_warp[w];
    if (machine->wgmmas_of_warp[w] < least) least = machine->wgmmas_of_warp[w];
  }
  if (number - least >= kLoggedWgmmas)
    fail("warp %d is %d wgmmas ahead of its warpgroup", warp, number - least);
  LoggedWgmma& logged = machine->wgmma_log[group][number % kLoggedWgmmas];
  if (number >= most)
    logged = {operation, argument};
  else if (logged.operation != operation || logged.argument != argument)
    fail("%s (%llx) meets %s (%llx) of another warp of its warpgroup", operation,
         static_cast<unsigned long long>(argument), logged.operation,
         static_cast<unsigned long long>(logged.argument));
}

// All lanes of a warp.
void meet(const char* operation, uint64_t argument) {
  {
    const Exchange exchange(operation, kFullMask, &argument, sizeof argument);
    uint64_t first = 0;
    exchange.read(0, &first);
    if (first != argument) fail("%s differs between the lanes of a warp", operation);
  }
  log_wgmma(operation, argument);
}

uint32_t bits_at(const void* place, int i) {
  return static_cast<const volatile uint32_t*>(place)[i];
}

bool is_poison(const HeldSums& held) {
  for (int i = 0; i < held.count; ++i)
    if (bits_at(held.place, i) != kPoison) return false;
  return true;
}

void check_untouched(const HeldSums& held) {
  if (!is_poison(held)) fail("accumulators were written while a wgmma on them is under way");
}

int hold_sums(float* sums, int count) {
  Fiber* self = running;
  int unused = -1;
  for (int i = 0; i < kMaxSums; ++i) {
    HeldSums& held = self->sums[i];
    if (held.users == 0) {
      unused = i;
    } else if (held.place == sums) {
      if (held.count != count) fail("a wgmma of another shape on accumulators under way");
      check_untouched(held);
      ++held.users;
      return i;
    } else if (sums < held.place + held.count && held.place < sums + count) {
      fail("a wgmma on a part of accumulators under way");
    }
  }
  if (unused < 0) fail("wgmmas on more than %d arrays at once", kMaxSums);
  HeldSums& held = self->sums[unused];
  held.place = sums;
  held.count = count;
  held.users = 1;
  for (int i = 0; i < count; ++i) {
    held.values[i] = static_cast<volatile float*>(sums)[i];
    reinterpret_cast<volatile uint32_t*>(sums)[i] = kPoison;
  }
  return unused;
}

void compute(QueuedWgmma& queued) {
  if (queued.is_done) return;
  queued.is_done = true;
  queued.wgmma.multiply(queued.wgmma, running->sums[queued.sums].values);
}

}  // namespace

void reset_warpgroups() {
  Machine& m = *machine;
  const int at_start = kRegisters / m.n_threads / 8 * 8;
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    m.wgmmas_of_warp[warp] = 0;
    m.registers_of_warp[warp] = at_start < 256 ? at_start : 256;
  }
  m.free_registers = 0;
}

void check_warpgroups_at_end() {
  for (int warp = 0; warp * kWarpSize < machine->n_threads; ++warp)
    if (machine->wgmmas_of_warp[warp] != machine->wgmmas_of_warp[warp / 4 * 4])
      fail("warp %d of a warpgroup issued fewer or more wgmmas than its first", warp);
}

void check_wgmmas_at_end(const Fiber& fiber) {
  if (fiber.n_wgmmas > 0) fail("the thread ends with wgmmas it never waited for");
}

void wgmma_fence() {
  meet("wgmma.fence", 0);
  running->is_wgmma_fenced = true;
}

void queue_wgmma(const Wgmma& wgmma, float* sums, const uint32_t* left, const char* operation) {
  Fiber* self = running;
  meet(operation, wgmma.descriptor * 2 + wgmma.accumulate);
  if (!self->is_wgmma_fenced) fail("a wgmma after a wait, or the first one, without wgmma.fence");
  if (self->n_wgmmas == kMaxWgmmas) fail("more than %d wgmmas under way", kMaxWgmmas);
  QueuedWgmma& queued = self->wgmmas[(self->first_wgmma + self->n_wgmmas++) % kMaxWgmmas];
  copy_bytes(&queued.wgmma, &wgmma, sizeof wgmma);
  queued.left_source = left;
  queued.group = self->open_wgmma_group;
  queued.is_done = false;
  queued.sums = hold_sums(sums, wgmma.n / 2);
  if (!is_random() || next_random() % 2) return;
  // In their order: a sum takes them so.
  for (int i = 0; i < self->n_wgmmas; ++i)
    compute(self->wgmmas[(self->first_wgmma + i) % kMaxWgmmas]);
}

void wgmma_commit() {
  meet("wgmma.commit_group", 0);
  ++running->open_wgmma_group;
}

void wgmma_wait(int pending) {
  Fiber* self = running;
  meet("wgmma.wait_group", static_cast<uint64_t>(pending));
  self->is_wgmma_fenced = false;
  while (self->n_wgmmas > 0) {
    QueuedWgmma& oldest = self->wgmmas[self->first_wgmma];
    if (oldest.group >= self->open_wgmma_group - pending) break;
    const uint32_t* mine = oldest.wgmma.left[self->number % 4];
    for (int i = 0; i < 4; ++i)
      if (bits_at(oldest.left_source, i) != mine[i])
        fail("left operands were written, or went out of scope, while a wgmma read them");
    compute(oldest);
    HeldSums& held = self->sums[oldest.sums];
    check_untouched(held);
    if (--held.users == 0)
      for (int i = 0; i < held.count; ++i)
        static_cast<volatile float*>(held.place)[i] = held.values[i];
    self->first_wgmma = (self->first_wgmma + 1) % kMaxWgmmas;
    --self->n_wgmmas;
  }
  maybe_switch();
}

bool elect_one() {
  const Exchange exchange("elect.sync", kFullMask, nullptr, 0);
  return lane_index() == machine->elected_lane;
}

void set_register_budget(int registers, bool is_increase) {
  Machine& m = *machine;
  const char* operation = is_increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  meet(operation, static_cast<uint64_t>(registers));
  if (running->number % kWarpSize != 0) return;
  int& mine = m.registers_of_warp[running->number / kWarpSize];
  if (is_increase ? registers < mine : registers > mine)
    fail("%s to %d registers from %d", operation, registers, mine);
  const int more = (registers - mine) * kWarpSize;
  while (more > m.free_registers) {
    running->state = State::kAwaitsRegisters;
    to_scheduler();
  }
  m.free_registers -= more;
  mine = registers;
  if (!is_increase) wake(State::kAwaitsRegisters, -1);
}

}  // namespace qlk::emulation
