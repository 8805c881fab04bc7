// Kernels that misuse sm_90's instructions, which the emulation must refuse; without a fault they
// are right. The numbers of the faults are in test_emulator_sm90.py.
#include "problem.h"
#include "qlk/cuda/ptx_wgmma.cuh"

namespace qlk::testing {
namespace {

constexpr dim3 kOne{1, 1, 1};
constexpr int kWarpgroup = 128;

enum PipelineFault {
  kNoWaitForFull = 1,
  kNoWaitForEmpty,
  kTooFewBytes,
  kTooManyBytes,
  kNoExpectation,
  kWrongParity,
  kOneArrivalTooMany,
  kNoInitFence,
  kNoBarrierAfterInit,
  kUnalignedDestination,
  kOutsideShared,
  kNobodyWaits,
  kCopiedTwice,
  kNoInit,
};

// Warp 0 copies `rounds` rows of 32 words through a ring of two, warp 1 sums them.
__global__ void faulty_pipeline_kernel(int fault, const uint32_t* source, int rounds,
                                       uint32_t* result) {
  constexpr int kStages = 2;
  constexpr uint32_t kBytes = kWarp * 4;
  SHARED_ARRAY(uint32_t, ring, [kStages * kWarp]);
  SHARED_ARRAY(uint64_t, full, [kStages]);
  SHARED_ARRAY(uint64_t, empty, [kStages]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (threadIdx.x == 0 && fault != kNoInit) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, kWarp);
    }
    if (fault != kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (fault != kNoBarrierAfterInit) __syncthreads();
  uint32_t sum = 0;
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % kStages;
    auto parity = static_cast<uint32_t>(round / kStages % 2);
    uint32_t* row = ring + stage * kWarp;
    if (threadIdx.x == 0) {
      if (fault != kNoWaitForEmpty) ptx::mbarrier_wait(empty + stage, parity ^ 1);
      if (fault == kUnalignedDestination) row += 2;
      if (fault == kOutsideShared) row = result;
      if (fault == kTooFewBytes) {
        ptx::mbarrier_arrive_expect_bytes(full + stage, kBytes - 16);
      } else if (fault == kTooManyBytes) {
        ptx::mbarrier_arrive_expect_bytes(full + stage, kBytes + 16);
      } else if (fault == kNoExpectation) {
        ptx::mbarrier_arrive(full + stage);
      } else {
        ptx::mbarrier_arrive_expect_bytes(full + stage, kBytes * (fault == kCopiedTwice ? 2 : 1));
      }
      if (fault == kOneArrivalTooMany) ptx::mbarrier_arrive(full + stage);
      ptx::copy_bulk(row, source + round * kWarp, kBytes, full + stage);
      if (fault == kCopiedTwice) ptx::copy_bulk(row, source, kBytes, full + stage);
    } else if (threadIdx.x >= kWarp) {
      if (fault == kWrongParity) parity ^= 1;
      if (fault == kNobodyWaits) return;
      if (fault != kNoWaitForFull) ptx::mbarrier_wait(full + stage, parity);
      sum += row[lane];
      ptx::mbarrier_arrive(empty + stage);
    }
  }
  if (threadIdx.x >= kWarp) result[lane] = sum;
  // The last phases of a ring that nobody waited for.
  if (fault == kNoWaitForFull && threadIdx.x == 0)
    for (int s = 0; s < kStages; ++s)
      ptx::mbarrier_wait(full + s, static_cast<uint32_t>((rounds - 1) / kStages % 2));
}

enum WgmmaFault {
  kNoWait = 1,
  kReadsTooEarly,
  kTileOverwritten,
  kLeftOverwritten,
  kSumsOverwritten,
  kNoFence,
  kWarpsDiffer,
  kWarpLeavesOut,
  kTileNotThere,
  kUnalignedTile,
  kTileOutside,
  kLaneLeavesOut,
};

// sums [64, 8] = left [64, 16] · tile, of ones.
__global__ void faulty_wgmma_kernel(int fault, const uint32_t* ones, float* result) {
  SWIZZLED_SHARED(uint32_t, tile);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  for (int i = thread; i < 256; i += kWarpgroup) tile[i] = ones[i];
  ptx::fence_async_proxy_shared();
  if (fault != kTileNotThere) __syncthreads();
  float sums[4] = {}, early = 0;
  uint32_t left[4] = {ones[0], ones[1], ones[2], ones[3]};
  const auto* at = reinterpret_cast<const unsigned char*>(tile);
  if (fault == kUnalignedTile) at += 256;
  if (fault == kTileOutside) at += 512;
  if (fault == kWarpsDiffer && warp == 2) at += 32;
  // A tile that is not at a boundary reaches beyond its end as well: fewer bytes between its rows.
  const uint64_t descriptor = fault == kTileOutside
                                  ? ptx::shared_descriptor(at, Swizzle::kNone, 128, 512)
                                  : ptx::shared_descriptor(at, Swizzle::k128Bytes);
  if (fault != kNoFence) ptx::wgmma_fence(sums);
  if (!(fault == kWarpLeavesOut && warp == 3) && !(fault == kLaneLeavesOut && thread == 70))
    ptx::wgmma_rs<true, 8>(sums, left, descriptor, true);
  if (fault == kReadsTooEarly) early = sums[0];
  if (fault == kTileOverwritten) tile[thread] = 0;
  if (fault == kLeftOverwritten) left[1] = 0;
  if (fault == kSumsOverwritten) sums[2] = 1.0f;
  ptx::wgmma_commit();
  if (fault != kNoWait) ptx::wgmma_wait<0>(sums);
  for (int i = 0; i < 4; ++i) result[4 * thread + i] = sums[i] + early;
}

enum OverlapFault {
  kNeverWaits = 1,
  kReadsBeforeWaiting,
  kOverwritesBeforeWaiting,
  kOneThreadWaits,
};

__global__ void first_kernel(const uint32_t* input, uint32_t* between) {
  ptx::launch_dependents();
  between[threadIdx.x] = input[threadIdx.x];
}
__global__ void overlapping_kernel(int fault, const uint32_t* between, uint32_t* input,
                                   uint32_t* result) {
  uint32_t value = 0;
  if (fault == kReadsBeforeWaiting) value = between[threadIdx.x];
  if (fault == kOverwritesBeforeWaiting) input[threadIdx.x] = 0;
  if (fault != kNeverWaits && (fault != kOneThreadWaits || threadIdx.x == 40))
    ptx::wait_for_primary();
  if (fault != kReadsBeforeWaiting) value = between[threadIdx.x];
  result[threadIdx.x] = value;
}

enum BarrierFault {
  kOtherCount = 1,
  kNumberZero,
  kTooFewThreads,
  kNoRegisters,
  kTooManyRegisters,
};

// 128 registers for each thread at the start.
__global__ void faulty_barrier_kernel(int fault, uint32_t* result) {
  constexpr int kThreads = 512;
  const bool first = threadIdx.x < kThreads / 2;
  const int count = fault == kOtherCount && first ? kThreads / 2 : kThreads;
  if (fault != kTooFewThreads || !first)
    ptx::named_barrier_sync(fault == kNumberZero ? 0 : 3, count);
  if (fault == kNoRegisters) ptx::register_budget_increase<160>();
  if (fault == kTooManyRegisters) ptx::register_budget_decrease<160>();
  result[threadIdx.x] = threadIdx.x;
}

int run_pipeline(const Problem& p) {
  return launch(faulty_pipeline_kernel, kOne, dim3{64, 1, 1}, 0, nullptr,
                static_cast<int>(p.integer("fault")),
                static_cast<const uint32_t*>(p.pointer<uint32_t>("source")),
                static_cast<int>(p.integer("rounds")), p.pointer<uint32_t>("result"));
}

int run_wgmma(const Problem& p) {
  return launch(faulty_wgmma_kernel, kOne, dim3{kWarpgroup, 1, 1}, 1024, nullptr,
                static_cast<int>(p.integer("fault")),
                static_cast<const uint32_t*>(p.pointer<uint32_t>("source")),
                p.pointer<float>("result"));
}

int run_overlap(const Problem& p) {
  auto *input = p.pointer<uint32_t>("input"), *between = p.pointer<uint32_t>("between");
  const dim3 block{64, 1, 1};
  launch(first_kernel, kOne, block, 0, nullptr, static_cast<const uint32_t*>(input), between);
  return launch_overlapping(
      overlapping_kernel, kOne, block, 0, nullptr, static_cast<int>(p.integer("fault")),
      static_cast<const uint32_t*>(between), input, p.pointer<uint32_t>("result"));
}

int run_barrier(const Problem& p) {
  return launch(faulty_barrier_kernel, kOne, dim3{512, 1, 1}, 0, nullptr,
                static_cast<int>(p.integer("fault")), p.pointer<uint32_t>("result"));
}

const Registration pipeline("faulty_pipeline", run_pipeline);
const Registration wgmma("faulty_wgmma", run_wgmma);
const Registration overlap("faulty_overlap", run_overlap);
const Registration barrier("faulty_barrier", run_barrier);

}  // namespace
}  // namespace qlk::testing
