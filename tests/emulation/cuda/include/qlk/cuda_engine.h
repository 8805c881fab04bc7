// The engine under the CUDA emulation: every thread of a block is a fiber of one OS thread.
//
// Its files are compiled without sanitizers, so that their own bookkeeping is no race; what a
// kernel does to memory is done by instrumented code in cuda_emulation.h and qlk/cuda/ptx.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qlk::emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Of the running thread; rewritten on every switch.
extern Dim3 thread_index, block_index, block_size, grid_size;

constexpr int kWarpSize = 32;
constexpr int kSlotBytes = 64;
constexpr unsigned kFullMask = 0xffffffffu;

// Prints what happened with the running thread's place and ends the process with status 3.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// 0 runs blocks and ready threads in order, any other number in a random order of its own.
void set_seed(uint64_t seed);

// A launch: body(context) as every thread of every block, blocks one after another; then
// destroy(context). `overlaps`: it may start before the launch ahead of it has run.
struct QueuedLaunch {
  Dim3 grid, block;
  size_t dynamic_shared_bytes;
  void (*body)(void*);
  void (*destroy)(void*);
  void* context;
  bool overlaps;
};
// A launch runs when the next one comes, unless that one overlaps it, or at synchronize().
void enqueue(const QueuedLaunch& launch);
void synchronize();

// Shared memory: registered statics and one dynamic array, filled with 0xFF before every block.
void register_shared(void* data, size_t bytes);
void* dynamic_shared(bool is_swizzled);
bool in_shared(const void* data, size_t bytes);
// 32-bit addresses of shared memory, as instructions see them. Dynamic shared memory begins at a
// boundary of 128 bytes there, and of no more unless it is there to be swizzled.
uint32_t window_address(const void* data);
const void* from_window(uint32_t address, size_t bytes);

// __syncthreads at a source line; meeting others at another line is an error.
void sync_threads(int line);
void sync_warp(unsigned mask, int line);

// Lanes of `mask` exchange `bytes` each: the constructor returns when all have arrived. Exchanges
// order no memory accesses, as on hardware.
class Exchange {
 public:
  Exchange(const char* operation, unsigned mask, const void* input, int bytes);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // The input of a lane of the mask; false for any other lane.
  bool read(int lane, void* out) const;

 private:
  void* record_;
};

int lane_index();

// cp.async: the copies of a thread, in order, and its groups.
struct AsyncCopy {
  void* destination;
  const void* source;
  int bytes, source_bytes;
};
void queue_copy(const AsyncCopy& copy);
void commit_copies();
// Takes the next copy that a wait for at most `pending` groups completes; false if there is none.
bool next_completed_copy(int pending, AsyncCopy* copy);

}  // namespace qlk::emulation
