// The engine: launches, blocks, barriers and shared memory; see qlk/cuda_engine.h.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "engine_state.h"

#if defined(QLK_ASAN)
#include <sanitizer/asan_interface.h>
#endif
#if defined(QLK_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace qlk::emulation {

Dim3 thread_index, block_index, block_size, grid_size;
Fiber* fibers[kMaxThreads];
int n_threads = 0;

namespace {

constexpr int kMaxSharedArrays = 256;
constexpr size_t kCanaryBytes = 64;
constexpr unsigned char kUninitialised = 0xff, kCanary = 0xa5;

struct SharedArray {
  unsigned char* data;
  size_t bytes;
};

int n_fibers = 0;
SharedArray shared_arrays[kMaxSharedArrays];
int n_shared_arrays = 0;
int ready[kMaxThreads];
int n_ready = 0;
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
unsigned char* dynamic_data = nullptr;
size_t dynamic_bytes = 0;
int n_exited = 0, n_at_barrier = 0, barrier_line = 0;
void *barrier_sync = nullptr, *block_start_sync = nullptr, *block_end_sync = nullptr;
uint64_t random_state = 0;
bool random_order = false;

uint64_t next_random() {
  // xorshift64*.
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1dull;
}

void fill_bytes(unsigned char* data, size_t bytes, unsigned char value) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(data)[i] = value;
}

// What a fiber runs, block after block; it never returns.
void fiber_main() {
  begin_fiber();
  for (;;) {
    acquire(block_start_sync);
    kernel_body(kernel_context);
    if (running->n_copies) fail("the thread ends with cp.async copies it never waited for");
    check_nobody_waits_for(*running);
    release(block_end_sync);
    running->state = State::kExited;
    ++n_exited;
    to_scheduler();
  }
}

Fiber* take_ready() {
  const int at = random_order ? static_cast<int>(next_random() % n_ready) : 0;
  Fiber* fiber = fibers[ready[at]];
  --n_ready;
  for (int i = at; i < n_ready; ++i) ready[i] = ready[i + 1];
  return fiber;
}

void finish_barrier_if_complete() {
  if (n_at_barrier == 0 || n_at_barrier + n_exited < n_threads) return;
  if (n_exited > 0)
    fail("%d of %d threads ended, the others wait in __syncthreads at line %d", n_exited, n_threads,
         barrier_line);
  n_at_barrier = 0;
  for (int i = 0; i < n_threads; ++i) make_ready(fibers[i]);
}

[[noreturn]] void report_deadlock() {
  std::fprintf(stderr, "cuda emulation: deadlock in block (%u, %u, %u)\n", block_index.x,
               block_index.y, block_index.z);
  for (int i = 0; i < n_threads; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == State::kAtBarrier)
      std::fprintf(stderr, "  thread %d waits in __syncthreads at line %d\n", i, fiber.line);
    if (fiber.state == State::kInExchange)
      std::fprintf(stderr, "  thread %d waits in %s for lanes %08x, %08x are there\n", i,
                   fiber.record->operation, fiber.record->mask, fiber.record->arrived);
  }
  std::fflush(stderr);
  std::_Exit(3);
}

void prepare_shared() {
  for (int i = 0; i < n_shared_arrays; ++i)
    fill_bytes(shared_arrays[i].data, shared_arrays[i].bytes, kUninitialised);
  if (dynamic_data) fill_bytes(dynamic_data, dynamic_bytes, kUninitialised);
}

void run_block() {
  prepare_shared();
  n_exited = n_at_barrier = 0;
  n_ready = 0;
  block_start_sync = new_sync();
  block_end_sync = new_sync();
  barrier_sync = new_sync();
  release(block_start_sync);
  for (int i = 0; i < n_threads; ++i) {
    const unsigned t = static_cast<unsigned>(i);
    fibers[i]->index = {t % block_size.x, t / block_size.x % block_size.y,
                        t / (block_size.x * block_size.y)};
    make_ready(fibers[i]);
  }
  while (n_exited < n_threads) {
    finish_barrier_if_complete();
    if (n_ready == 0) report_deadlock();
    to_fiber(take_ready());
  }
  acquire(block_end_sync);
#if !defined(QLK_ASAN)
  for (size_t i = 0; dynamic_data && i < kCanaryBytes; ++i)
    if (dynamic_data[dynamic_bytes + i] != kCanary)
      fail("a write past the %zu bytes of dynamic shared memory", dynamic_bytes);
#endif
}

}  // namespace

void make_ready(Fiber* fiber) {
  fiber->state = State::kReady;
  ready[n_ready++] = fiber->number;
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

void run_grid(Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  kernel_body = body;
  kernel_context = context;
  grid_size = grid;
  block_size = block;
  n_threads = static_cast<int>(block.x * block.y * block.z);
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || n_threads == 0 || n_threads > kMaxThreads || grid.y > 65535 || grid.z > 65535)
    fail("no such launch: grid (%u, %u, %u), %d threads", grid.x, grid.y, grid.z, n_threads);
#if defined(QLK_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (; n_fibers < n_threads; ++n_fibers) fibers[n_fibers] = new_fiber(n_fibers, fiber_main);

  dynamic_bytes = shared_bytes;
  dynamic_data = nullptr;
  if (shared_bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes + kCanaryBytes) != 0) fail("out of memory");
    dynamic_data = static_cast<unsigned char*>(memory);
    fill_bytes(dynamic_data + shared_bytes, kCanaryBytes, kCanary);
#if defined(QLK_ASAN)
    __asan_poison_memory_region(dynamic_data + shared_bytes, kCanaryBytes);
#endif
  }
  std::vector<unsigned> order;
  for (size_t b = 0; b < blocks; ++b) order.push_back(static_cast<unsigned>(b));
  for (size_t b = blocks; random_order && b > 1; --b)
    std::swap(order[b - 1], order[next_random() % b]);
  for (const unsigned number : order) {
    block_index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
    run_block();
  }
  if (dynamic_data) {
#if defined(QLK_ASAN)
    __asan_unpoison_memory_region(dynamic_data + shared_bytes, kCanaryBytes);
#endif
    std::free(dynamic_data);
    dynamic_data = nullptr;
  }
}

void register_shared(void* data, size_t bytes) {
  auto* array = static_cast<unsigned char*>(data);
  if (n_shared_arrays == kMaxSharedArrays) fail("more than %d shared arrays", kMaxSharedArrays);
  shared_arrays[n_shared_arrays++] = {array, bytes};
  fill_bytes(array, bytes, kUninitialised);
}

void* dynamic_shared() {
  if (!dynamic_data) fail("the launch asked for no dynamic shared memory");
  return dynamic_data;
}

bool in_shared(const void* data, size_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(data);
  const auto inside = [&](const unsigned char* array, size_t size) {
    return array && begin >= array && begin + bytes <= array + size;
  };
  bool found = inside(dynamic_data, dynamic_bytes);
  for (int i = 0; i < n_shared_arrays; ++i)
    found = found || inside(shared_arrays[i].data, shared_arrays[i].bytes);
  return found;
}

void sync_threads(int line) {
  if (n_at_barrier > 0 && barrier_line != line)
    fail("__syncthreads at line %d meets __syncthreads at line %d", line, barrier_line);
  if (n_at_barrier == 0) {
    barrier_line = line;
    barrier_sync = new_sync();
  }
  void* sync = barrier_sync;
  release(sync);
  ++n_at_barrier;
  running->state = State::kAtBarrier;
  running->line = line;
  to_scheduler();
  acquire(sync);
}

}  // namespace qlk::emulation
