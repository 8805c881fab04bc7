// The engine's part of sm_90: overlapping launches, mbarriers and the copies that complete on them,
// named barriers, warpgroups. qlk/cuda_twins_sm90.h has what touches a kernel's memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qlk::emulation {

// Of a launch that may overlap the one before: returns when that one has run. It starts as late as
// it can: when no thread of this launch can go on without it.
void wait_for_primary();

// What a kernel's tensor map says; csrc/include/qlk/cuda/tensor_map.cuh makes it.
struct alignas(64) TensorMap {
  const unsigned char* data;
  int64_t inner, outer, row_stride_bytes;
  int element_bytes, box_inner, box_outer, swizzle_bytes;
};

// mbarriers, by the address of their word in shared memory.
void mbarrier_init(const void* mbarrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(const void* mbarrier, uint32_t expected_bytes);
// Blocks until the phase of that parity has ended, or until only its copies are missing: then
// returns true, and the caller makes them and calls end_phase.
bool await_phase(const void* mbarrier, uint32_t parity);
void end_phase(const void* mbarrier);

// A copy to shared memory, of `bytes` or of a tensor map's box (map.data is not null then).
struct BulkCopy {
  void* destination;
  const void* source;
  uint32_t bytes;
  TensorMap map;
  int32_t inner, outer;
};
// Checks the copy and adds it to the barrier's phase. The caller has poisoned the destination.
void queue_bulk_copy(const BulkCopy& copy, const void* mbarrier);
// Takes the next copy of the barrier's phase; false if there is none.
bool next_bulk_copy(const void* mbarrier, BulkCopy* copy);

// bar.sync with a number.
void sync_named(int id, int threads);

bool elect_one();
void set_register_budget(int registers, bool is_increase);

// One thread's part of a wgmma: its rows' left operands (from the four lanes of its quad), and what
// multiplies them: values [n / 2] = (accumulate ? values : 0) + the products.
struct Wgmma {
  uint32_t left[4][4];
  uint64_t descriptor;
  int n;
  bool accumulate;
  void (*multiply)(const Wgmma& wgmma, float* values);
};
void wgmma_fence();
// Poisons `sums`; they come back at the wait. `left` is compared with its present contents there.
void queue_wgmma(const Wgmma& wgmma, float* sums, const uint32_t* left, const char* operation);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace qlk::emulation
