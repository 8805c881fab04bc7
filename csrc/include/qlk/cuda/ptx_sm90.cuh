// What sm_90 adds: overlapping launches, mbarriers, copies by the tensor memory accelerator, named
// barriers, register budgets. As in qlk/cuda/ptx.cuh, each instruction is a function with its twin
// for the emulation; qlk/cuda/ptx_wgmma.cuh has the products. Semantics: "Parallel Thread Execution
// ISA" 9.0, by the instruction named at each.
#pragma once

#include "qlk/cuda/ptx.cuh"
#include "qlk/cuda/tensor_map.cuh"
#if defined(QLK_EMULATE_CUDA)
#include "qlk/cuda_twins_sm90.h"
#endif

namespace qlk::ptx {

// Overlapping launches (griddepcontrol): see launch_overlapping in qlk/cuda/device.cuh. Nothing
// below sm_90, where launches do not overlap.

// griddepcontrol.launch_dependents: a kernel launched to overlap this one may start once every
// block has said so or ended. It says nothing of what this kernel has written.
__device__ __forceinline__ void launch_dependents() {
#if !defined(QLK_EMULATE_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// griddepcontrol.wait: returns when the kernel before this one has ended and all that it wrote can
// be read. Returns at once where this kernel was launched as usual.
__device__ __forceinline__ void wait_for_primary() {
#if defined(QLK_EMULATE_CUDA)
  emulation::wait_for_primary();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// mbarrier (section "mbarrier"): a phase ends when as many arrivals as the barrier was made for
// have come and all bytes that they announced have been copied; then the next one begins. Waiting
// is for the phase of a parity: a fresh barrier is in the phase of parity 0, and waiting for parity
// 1 there returns at once. Arrivals release, waits acquire, for threads of this block.

// mbarrier.init, by one thread, once; fence_mbarrier_init and a barrier of the block before others
// use it. The 8 bytes are shared memory.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
#if defined(QLK_EMULATE_CUDA)
  emulation::mbarrier_init(barrier, arrivals);
  *barrier = static_cast<uint64_t>(arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// fence.mbarrier_init: makes this thread's mbarrier_init calls visible to asynchronous copies.
__device__ __forceinline__ void fence_mbarrier_init() {
#if defined(QLK_EMULATE_CUDA)
  emulation::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// mbarrier.arrive: one arrival.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#if defined(QLK_EMULATE_CUDA)
  emulation::arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// mbarrier.arrive.expect_tx: one arrival that announces `bytes` of copies to this phase.
__device__ __forceinline__ void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes) {
#if defined(QLK_EMULATE_CUDA)
  emulation::arrive(barrier, bytes);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// mbarrier.try_wait.parity until it says yes: returns when the phase of that parity has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t phase_parity) {
#if defined(QLK_EMULATE_CUDA)
  emulation::wait_for_phase(barrier, phase_parity);
#else
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(phase_parity)
        : "memory");
  } while (!done);
#endif
}

// fence.proxy.async: what this thread wrote to shared memory with ordinary stores is seen by
// asynchronous copies and wgmma that come after it (and after a barrier, for another thread's). The
// emulation does not see where it is missing.
__device__ __forceinline__ void fence_async_proxy_shared() {
#if !defined(QLK_EMULATE_CUDA)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// createpolicy.fractional: for copies of what is read once; L2 gives it up first.
__device__ __forceinline__ uint64_t evict_first_policy() {
#if defined(QLK_EMULATE_CUDA)
  return 0;
#else
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}

// cp.async.bulk from global to shared memory, by one thread: `bytes` (a multiple of 16; both
// pointers too) that complete on `barrier`. With a policy, L2 is told how to keep them.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
#if defined(QLK_EMULATE_CUDA)
  emulation::issue_bulk(shared, global, bytes, barrier);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier, uint64_t policy) {
#if defined(QLK_EMULATE_CUDA)
  (void)policy;
  emulation::issue_bulk(shared, global, bytes, barrier);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
#endif
}

// cp.async.bulk.tensor.2d, by one thread: the box of `map` whose first element is in column `inner`
// of row `outer` to `shared` (at a 128-byte boundary; swizzled boxes at one of 8 times their row
// width), zeros where the matrix has no element. Completes on `barrier` with all bytes of the box.
__device__ __forceinline__ void copy_tensor_2d(void* shared, const TensorMap* map, int32_t inner,
                                               int32_t outer, uint64_t* barrier) {
#if defined(QLK_EMULATE_CUDA)
  emulation::issue_tensor(shared, map, inner, outer, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer)
      : "memory");
#endif
}
__device__ __forceinline__ void copy_tensor_2d(void* shared, const TensorMap* map, int32_t inner,
                                               int32_t outer, uint64_t* barrier, uint64_t policy) {
#if defined(QLK_EMULATE_CUDA)
  (void)policy;
  emulation::issue_tensor(shared, map, inner, outer, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer), "l"(policy)
      : "memory");
#endif
}

// prefetch.tensormap: a hint.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
#if defined(QLK_EMULATE_CUDA)
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// bar.sync id, threads: a barrier of `threads` threads (whole warps) with an id of 1 ... 15;
// __syncthreads has 0.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
#if defined(QLK_EMULATE_CUDA)
  emulation::sync_named(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// elect.sync: true in one lane of the warp, always the same, whichever that is.
__device__ __forceinline__ bool elect_one() {
#if defined(QLK_EMULATE_CUDA)
  return emulation::elect_one();
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}"
      : "=r"(elected));
  return elected;
#endif
}

// setmaxnreg, by all warps of a warpgroup: registers of each of its threads from here on, a
// multiple of 8 in 24 ... 256. An increase waits until others have given up enough. The kernel's
// threads begin with what __launch_bounds__ leaves them: 65536 / threads, rounded down to a
// multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void register_budget_increase() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
#if defined(QLK_EMULATE_CUDA)
  emulation::set_register_budget(kRegisters, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void register_budget_decrease() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
#if defined(QLK_EMULATE_CUDA)
  emulation::set_register_budget(kRegisters, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace qlk::ptx
