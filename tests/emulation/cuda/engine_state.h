// What the files of the engine share. Fixed arrays throughout: an allocation or a memmove in a
// fiber would be seen by TSAN, and called a race.
#pragma once

#include <vector>

#include "qlk/cuda_engine.h"
#include "qlk/cuda_engine_sm90.h"

namespace qlk::emulation {

constexpr int kMaxThreads = 1024, kMaxRecords = 2048, kMaxCopies = 128;
constexpr int kMaxWarps = kMaxThreads / kWarpSize, kMaxWarpgroups = kMaxWarps / 4;
constexpr int kMaxMbarriers = 64, kMaxBulkCopies = 256, kNamedBarriers = 16;
constexpr int kMaxWgmmas = 64, kMaxSums = 16, kMaxSumsOfOne = 128, kLoggedWgmmas = 256;
constexpr int kMaxSharedArrays = 256;

enum class State {
  kReady,
  kAtBarrier,
  kInExchange,
  kAtMbarrier,
  kAtNamedBarrier,
  kAwaitsRegisters,
  kAwaitsPrimary,
  kExited
};

// A rendezvous of the lanes of a mask. `readers` keeps it until all have left.
struct Record {
  const char* operation;
  unsigned mask, arrived;
  int warp, readers, bytes;
  bool open;
  void* sync;
  alignas(16) unsigned char slots[kWarpSize][kSlotBytes];
};

struct QueuedCopy {
  AsyncCopy copy;
  int group;
};

struct Mbarrier {
  const void* address;
  int count, pending;  // arrivals of a phase, and those of this one that are still to come
  uint64_t phase;
  int64_t expected, under_way;  // bytes announced to this phase, and those of its copies
  bool is_fenced;
  int initialised_by;
  // Everyone's releases to this phase, and to the one before.
  void *sync, *previous_sync;
};

struct QueuedBulkCopy {
  BulkCopy copy;
  int mbarrier;
};

struct NamedBarrier {
  int threads, arrived;
  void* sync;
};

// The wgmmas of a thread under way, and their accumulators: what these hold when it is done.
struct QueuedWgmma {
  Wgmma wgmma;
  const uint32_t* left_source;
  int sums, group;
  bool is_done;
};
struct HeldSums {
  float* place;
  int count, users;
  float values[kMaxSumsOfOne];
};

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* tsan = nullptr;
  void* asan_stack = nullptr;
  Dim3 index;
  int number = 0;
  State state = State::kExited;
  int line = 0;  // of __syncthreads; the number of a named barrier or of an mbarrier
  uint32_t parity = 0;
  Record* record = nullptr;
  QueuedCopy copies[kMaxCopies];  // a ring
  int first_copy = 0, n_copies = 0, open_group = 0;
  QueuedWgmma wgmmas[kMaxWgmmas];  // a ring
  int first_wgmma = 0, n_wgmmas = 0, open_wgmma_group = 0;
  bool is_wgmma_fenced = false;
  HeldSums sums[kMaxSums];
};

struct LoggedWgmma {
  const char* operation;
  uint64_t argument;
};

// All of one running launch. A launch that another one waits for in its middle runs on the next
// machine.
struct Machine {
  Fiber* fibers[kMaxThreads];
  int n_fibers, n_threads;
  int ready[kMaxThreads];
  int n_ready, n_exited, n_at_barrier, barrier_line;
  void *barrier_sync, *block_start_sync, *block_end_sync;
  void (*body)(void*);
  void* context;
  unsigned char* dynamic_data;
  size_t dynamic_bytes;
  bool dynamic_is_swizzled;
  uint32_t static_windows[kMaxSharedArrays], next_static_window;
  Record records[kMaxRecords];
  Mbarrier mbarriers[kMaxMbarriers];
  int n_mbarriers;
  QueuedBulkCopy bulk_copies[kMaxBulkCopies];
  int n_bulk_copies;
  NamedBarrier named_barriers[kNamedBarriers];
  LoggedWgmma wgmma_log[kMaxWarpgroups][kLoggedWgmmas];
  int wgmmas_of_warp[kMaxWarps];
  int registers_of_warp[kMaxWarps], free_registers;
  int elected_lane;
  // The launch to wait for, by its place in the queue, or -1; whether anyone has; its end.
  int primary;
  bool has_waited;
  void* primary_sync;
};

extern Machine* machine;
extern Fiber* running;
// Where the scheduler stands; the fibers go back to it.
extern void* scheduler_tsan;

// fibers.cpp
Fiber* new_fiber(int number, void (*entry)());
void begin_fiber();  // the first call of `entry`
void to_scheduler();
void to_fiber(Fiber* fiber);
// What TSAN knows of an ordering is kept per address: a new one for every event keeps them apart.
void* new_sync();
void release(void* sync);
void acquire(void* sync);

// engine.cpp
uint64_t next_random();
// No memcpy: TSAN would see it.
void copy_bytes(void* to, const void* from, size_t bytes);
bool is_random();
void make_ready(Fiber* fiber);
// Those that wait in `state`, and where `place` is not negative, there.
void wake(State state, int place);
// Gives other threads a chance to go first, now and then.
void maybe_switch();
// As launch number `primary` + 1 of the queue.
void run_grid(const QueuedLaunch& launch, int primary);

// shared_memory.cpp: of a block, of a launch, and the statics of one that waits for another.
void prepare_shared();
void allocate_dynamic(size_t bytes);
void check_dynamic_end();
void free_dynamic();
std::vector<unsigned char> save_shared();
void restore_shared(const std::vector<unsigned char>& saved);

// launches.cpp: runs a launch of the queue in the middle of the one that waits for it.
void run_primary(int primary);

// exchange.cpp: ends the process if a lane that ends is awaited by others.
void check_nobody_waits_for(const Fiber& fiber);

// mbarriers.cpp, warpgroups.cpp
void reset_mbarriers();
void check_mbarriers_at_end();
void describe_mbarrier(const Fiber& fiber, char* text, size_t size);
void reset_warpgroups();
void check_warpgroups_at_end();
void check_wgmmas_at_end(const Fiber& fiber);

}  // namespace qlk::emulation
