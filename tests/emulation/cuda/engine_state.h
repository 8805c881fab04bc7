// What the files of the engine share. Fixed arrays throughout: an allocation or a memmove in a
// fiber would be seen by TSAN, and called a race.
#pragma once

#include "qlk/cuda_engine.h"

namespace qlk::emulation {

constexpr int kMaxThreads = 1024, kMaxRecords = 2048, kMaxCopies = 128;

enum class State { kReady, kAtBarrier, kInExchange, kExited };

// A rendezvous of the lanes of a mask. `readers` keeps it until all have left.
struct Record {
  const char* operation = "";
  unsigned mask = 0, arrived = 0;
  int warp = 0, readers = 0, bytes = 0;
  bool open = false;
  void* sync = nullptr;
  alignas(16) unsigned char slots[kWarpSize][kSlotBytes];
};

struct QueuedCopy {
  AsyncCopy copy;
  int group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* tsan = nullptr;
  void* asan_stack = nullptr;
  Dim3 index;
  int number = 0;
  State state = State::kExited;
  int line = 0;
  Record* record = nullptr;
  QueuedCopy copies[kMaxCopies];  // a ring
  int first_copy = 0, n_copies = 0, open_group = 0;
};

extern Fiber* fibers[kMaxThreads];
extern Fiber* running;
extern Record records[kMaxRecords];
extern int n_threads;
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
void make_ready(Fiber* fiber);

// exchange.cpp: ends the process if a lane that ends is awaited by others.
void check_nobody_waits_for(const Fiber& fiber);

}  // namespace qlk::emulation
