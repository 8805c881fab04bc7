// The engine: blocks, their threads in turn, and __syncthreads; see qlk/cuda_engine.h.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "engine_state.h"

#if defined(QLK_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace qlk::emulation {

Dim3 thread_index, block_index, block_size, grid_size;
Machine* machine = nullptr;

namespace {

constexpr int kMaxDepth = 4;

Machine machines[kMaxDepth];
uint64_t random_state = 0;
bool random_order = false;

// What a fiber runs, block after block; it never returns.
void fiber_main() {
  begin_fiber();
  for (;;) {
    acquire(machine->block_start_sync);
    machine->body(machine->context);
    if (running->n_copies) fail("the thread ends with cp.async copies it never waited for");
    check_wgmmas_at_end(*running);
    check_nobody_waits_for(*running);
    release(machine->block_end_sync);
    running->state = State::kExited;
    ++machine->n_exited;
    to_scheduler();
  }
}

Fiber* take_ready() {
  Machine& m = *machine;
  const int at = random_order ? static_cast<int>(next_random() % m.n_ready) : 0;
  Fiber* fiber = m.fibers[m.ready[at]];
  --m.n_ready;
  for (int i = at; i < m.n_ready; ++i) m.ready[i] = m.ready[i + 1];
  return fiber;
}

void finish_barrier_if_complete() {
  Machine& m = *machine;
  if (m.n_at_barrier == 0 || m.n_at_barrier + m.n_exited < m.n_threads) return;
  if (m.n_exited > 0)
    fail("%d of %d threads ended, the others wait in __syncthreads at line %d", m.n_exited,
         m.n_threads, m.barrier_line);
  m.n_at_barrier = 0;
  for (int i = 0; i < m.n_threads; ++i) make_ready(m.fibers[i]);
}

// What a thread that cannot go on waits for.
void describe(const Fiber& fiber, char* text, size_t size) {
  const NamedBarrier& barrier = machine->named_barriers[fiber.line % kNamedBarriers];
  switch (fiber.state) {
    case State::kAtBarrier:
      std::snprintf(text, size, "__syncthreads at line %d", fiber.line);
      break;
    case State::kInExchange:
      std::snprintf(text, size, "%s for lanes %08x, %08x are there", fiber.record->operation,
                    fiber.record->mask, fiber.record->arrived);
      break;
    case State::kAtMbarrier:
      describe_mbarrier(fiber, text, size);
      break;
    case State::kAtNamedBarrier:
      std::snprintf(text, size, "barrier %d with %d of %d threads", fiber.line, barrier.arrived,
                    barrier.threads);
      break;
    case State::kAwaitsRegisters:
      std::snprintf(text, size, "registers, %d are free", machine->free_registers);
      break;
    default:
      text[0] = 0;
  }
}

[[noreturn]] void report_deadlock() {
  std::fprintf(stderr, "cuda emulation: deadlock in block (%u, %u, %u)\n", block_index.x,
               block_index.y, block_index.z);
  char text[256], last[256] = "";
  for (int i = 0; i <= machine->n_threads; ++i) {
    text[0] = 0;
    if (i < machine->n_threads) describe(*machine->fibers[i], text, sizeof text);
    if (std::strcmp(text, last) == 0) continue;
    if (last[0]) std::fprintf(stderr, " to %d wait: %s\n", i - 1, last);
    if (text[0]) std::fprintf(stderr, "  threads %d", i);
    std::strcpy(last, text);
  }
  std::fflush(stderr);
  std::_Exit(3);
}

// When no thread can go on.
void start_primary_or_report() {
  Machine& m = *machine;
  bool is_awaited = false;
  for (int i = 0; i < m.n_threads; ++i)
    is_awaited = is_awaited || m.fibers[i]->state == State::kAwaitsPrimary;
  if (!is_awaited) report_deadlock();
  const int primary = m.primary;
  m.primary = -1;
  run_primary(primary);
  m.primary_sync = new_sync();
  release(m.primary_sync);
  wake(State::kAwaitsPrimary, -1);
}

void run_block() {
  Machine& m = *machine;
  prepare_shared();
  m.n_exited = m.n_at_barrier = 0;
  m.n_ready = 0;
  reset_mbarriers();
  reset_warpgroups();
  m.block_start_sync = new_sync();
  m.block_end_sync = new_sync();
  m.barrier_sync = new_sync();
  release(m.block_start_sync);
  for (int i = 0; i < m.n_threads; ++i) {
    const unsigned t = static_cast<unsigned>(i);
    m.fibers[i]->index = {t % block_size.x, t / block_size.x % block_size.y,
                          t / (block_size.x * block_size.y)};
    make_ready(m.fibers[i]);
  }
  while (m.n_exited < m.n_threads) {
    finish_barrier_if_complete();
    if (m.n_ready == 0)
      start_primary_or_report();
    else
      to_fiber(take_ready());
  }
  acquire(m.block_end_sync);
  check_mbarriers_at_end();
  check_warpgroups_at_end();
  check_dynamic_end();
}

void run_blocks(const QueuedLaunch& launch) {
  const Dim3 grid = launch.grid;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  allocate_dynamic(launch.dynamic_shared_bytes);
  std::vector<unsigned> order;
  for (size_t b = 0; b < blocks; ++b) order.push_back(static_cast<unsigned>(b));
  for (size_t b = blocks; random_order && b > 1; --b)
    std::swap(order[b - 1], order[next_random() % b]);
  for (const unsigned number : order) {
    block_index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
    run_block();
  }
  free_dynamic();
}

}  // namespace

uint64_t next_random() {
  // xorshift64*.
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1dull;
}

void copy_bytes(void* to, const void* from, size_t bytes) {
  auto* out = static_cast<volatile unsigned char*>(to);
  const auto* in = static_cast<const volatile unsigned char*>(from);
  for (size_t i = 0; i < bytes; ++i) out[i] = in[i];
}

bool is_random() { return random_order; }

void make_ready(Fiber* fiber) {
  fiber->state = State::kReady;
  machine->ready[machine->n_ready++] = fiber->number;
}

void wake(State state, int place) {
  for (int i = 0; i < machine->n_threads; ++i) {
    Fiber* fiber = machine->fibers[i];
    if (fiber->state == state && (place < 0 || fiber->line == place)) make_ready(fiber);
  }
}

void maybe_switch() {
  if (!random_order || next_random() % 2) return;
  make_ready(running);
  to_scheduler();
}

void fail(const char* format, ...) {
  std::fprintf(stderr, "cuda emulation: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (running)
    std::fprintf(stderr, " [thread %d of block (%u, %u, %u)]", running->number, block_index.x,
                 block_index.y, block_index.z);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(3);
}

void set_seed(uint64_t seed) {
  random_order = seed != 0;
  random_state = seed * 0x9e3779b97f4a7c15ull + 1;
}

void run_grid(const QueuedLaunch& launch, int primary) {
  const Dim3 outer_block = block_index, outer_size = block_size, outer_grid = grid_size;
  const std::vector<unsigned char> outer_shared =
      machine ? save_shared() : std::vector<unsigned char>();
  Machine* const outer = machine;
  machine = outer ? outer + 1 : machines;
  if (machine == machines + kMaxDepth) fail("more than %d launches that overlap", kMaxDepth);
  Machine& m = *machine;
  m.body = launch.body;
  m.context = launch.context;
  grid_size = launch.grid;
  block_size = launch.block;
  m.n_threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  m.primary = primary;
  m.has_waited = false;
  m.primary_sync = nullptr;
  m.elected_lane = random_order ? static_cast<int>(next_random() % kWarpSize) : 0;
  const size_t blocks = size_t{grid_size.x} * grid_size.y * grid_size.z;
  if (blocks == 0 || m.n_threads == 0 || m.n_threads > kMaxThreads || grid_size.y > 65535 ||
      grid_size.z > 65535)
    fail("no such launch: grid (%u, %u, %u), %d threads", grid_size.x, grid_size.y, grid_size.z,
         m.n_threads);
#if defined(QLK_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (; m.n_fibers < m.n_threads; ++m.n_fibers)
    m.fibers[m.n_fibers] = new_fiber(m.n_fibers, fiber_main);
  run_blocks(launch);
  if (launch.overlaps && !m.has_waited)
    fail("a kernel was launched to overlap the one before it, and never waits for it");
  machine = outer;
  restore_shared(outer_shared);
  block_index = outer_block;
  block_size = outer_size;
  grid_size = outer_grid;
}

void sync_threads(int line) {
  Machine& m = *machine;
  if (m.n_at_barrier > 0 && m.barrier_line != line)
    fail("__syncthreads at line %d meets __syncthreads at line %d", line, m.barrier_line);
  if (m.n_at_barrier == 0) {
    m.barrier_line = line;
    m.barrier_sync = new_sync();
  }
  void* sync = m.barrier_sync;
  release(sync);
  ++m.n_at_barrier;
  running->state = State::kAtBarrier;
  running->line = line;
  to_scheduler();
  acquire(sync);
}

}  // namespace qlk::emulation
