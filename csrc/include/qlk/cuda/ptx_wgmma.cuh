// wgmma, the products of a warpgroup (128 threads: four warps, the first a multiple of four),
// sm_90a alone. Semantics: "Parallel Thread Execution ISA" 9.0, section "Asynchronous Warpgroup
// Level Matrix Multiply-Accumulate Instructions". Each with its twin for the emulation.
//
//   wgmma_fence(sums);
//   wgmma_rs<kBFloat16, kN>(sums, left, descriptor, true);   // any number of them
//   wgmma_commit();
//   ...
//   wgmma_wait<0>(sums);
//
// From the first wgmma to the wait that covers its group, the accumulators must not be read or
// written, nor `left` written (both arrays stay in scope), nor the tile in shared memory.
#pragma once

#include "qlk/cuda/ptx_sm90.cuh"

namespace qlk::ptx {

// A matrix descriptor ("Matrix Descriptor Format") of a tile in shared memory, rows of N, K next to
// each other. Swizzled: rows as wide as the swizzle, one after another, from a boundary of 8 rows
// on, as copy_tensor_2d leaves them; for the columns from 16 k on `tile` points 32 k bytes further.
// kNone: 8 rows of 16 bytes, one after another, are contiguous; `leading_bytes` from there to the
// next 8 columns, `stride_bytes` to the next 8 rows.
__device__ __forceinline__ uint64_t shared_descriptor(const void* tile, Swizzle swizzle,
                                                      uint32_t stride_bytes,
                                                      uint32_t leading_bytes) {
  const uint64_t mode = swizzle == Swizzle::kNone       ? 0
                        : swizzle == Swizzle::k128Bytes ? 1
                        : swizzle == Swizzle::k64Bytes  ? 2
                                                        : 3;
  const auto field = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return field(shared_address(tile)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
         mode << 62;
}
__device__ __forceinline__ uint64_t shared_descriptor(const void* tile, Swizzle swizzle) {
  return shared_descriptor(tile, swizzle, 8 * static_cast<uint32_t>(swizzle), 16);
}

// Registers that a wgmma uses, as the compiler sees them: it moves no access across this.
template <int kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#if !defined(QLK_EMULATE_CUDA)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
#else
  (void)registers;
#endif
}

// wgmma.fence: orders accesses to registers, by all threads of the warpgroup, before the wgmmas
// that follow. Needed before the first of them and after each change of accumulators or `left`.
template <class... Sums>
__device__ __forceinline__ void wgmma_fence(Sums&... sums) {
  (hold(sums), ...);
#if defined(QLK_EMULATE_CUDA)
  emulation::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// wgmma.commit_group: the wgmmas since the last commit become a group.
__device__ __forceinline__ void wgmma_commit() {
#if defined(QLK_EMULATE_CUDA)
  emulation::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// wgmma.wait_group: waits until at most kPending groups are under way. `sums`: all accumulators
// that are read afterwards.
template <int kPending, class... Sums>
__device__ __forceinline__ void wgmma_wait(Sums&... sums) {
#if defined(QLK_EMULATE_CUDA)
  emulation::wgmma_wait(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
  (hold(sums), ...);
}

#if !defined(QLK_EMULATE_CUDA)
// Accumulators as operands 0, 1, ..., and in the instruction.
#define QLK_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define QLK_SUMS_8(i) QLK_SUMS_4(i), QLK_SUMS_4(i + 4)
#define QLK_SUMS_12(i) QLK_SUMS_8(i), QLK_SUMS_4(i + 8)
#define QLK_SUMS_16(i) QLK_SUMS_8(i), QLK_SUMS_8(i + 8)
#define QLK_SUMS_24(i) QLK_SUMS_16(i), QLK_SUMS_8(i + 16)
#define QLK_SUMS_32(i) QLK_SUMS_16(i), QLK_SUMS_16(i + 16)
#define QLK_SUMS_48(i) QLK_SUMS_32(i), QLK_SUMS_16(i + 32)
#define QLK_SUMS_64(i) QLK_SUMS_32(i), QLK_SUMS_32(i + 32)
#define QLK_SUMS_128(i) QLK_SUMS_64(i), QLK_SUMS_64(i + 64)

#define QLK_NAMES_4 "%0, %1, %2, %3"
#define QLK_NAMES_8 QLK_NAMES_4 ", %4, %5, %6, %7"
#define QLK_NAMES_12 QLK_NAMES_8 ", %8, %9, %10, %11"
#define QLK_NAMES_16 QLK_NAMES_12 ", %12, %13, %14, %15"
#define QLK_NAMES_24 QLK_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define QLK_NAMES_32 QLK_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define QLK_NAMES_48                                                       \
  QLK_NAMES_32                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45" \
  ", %46, %47"
#define QLK_NAMES_64                                                       \
  QLK_NAMES_48                                                             \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61" \
  ", %62, %63"
#define QLK_NAMES_128                                                                        \
  QLK_NAMES_64                                                                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80"    \
  ", %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97"    \
  ", %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112" \
  ", %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// `left`, `descriptor` and `accumulate` are the operands after the accumulators; then come no
// negations, and no transposition of the right operand.
#define QLK_WGMMA(type, n, count, left0, left1, left2, left3, descriptor_name, accumulate_name) \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " accumulate_name            \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type            \
               " {" QLK_NAMES_##count "}, {" left0 ", " left1 ", " left2 ", " left3             \
                                      "}, " descriptor_name ", accumulate, 1, 1, 0;\n}"         \
               : QLK_SUMS_##count(0)                                                            \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(descriptor),       \
                 "r"(static_cast<uint32_t>(accumulate)))
#define QLK_WGMMA_EITHER(n, count, ...)       \
  if constexpr (kBFloat16)                    \
    QLK_WGMMA("bf16", n, count, __VA_ARGS__); \
  else                                        \
    QLK_WGMMA("f16", n, count, __VA_ARGS__)
#endif

// wgmma.mma_async.m64nNk16: sums [64, kN] = left · right, plus sums where `accumulate`: left
// [64, 16] in registers, right [16, kN] in shared memory, its columns being the descriptor's rows.
// Thread by thread of a warp as in multiply_add, warp w having rows 16 w on: with g = lane / 4,
// t = lane % 4, left[i] holds row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next; sums[i] is
// row g + 8 (i / 2 % 2), column 8 (i / 4) + 2t + i % 2. Products are exact, sums fp32.
template <bool kBFloat16, int kN>
__device__ __forceinline__ void wgmma_rs(float (&sums)[kN / 2], const uint32_t (&left)[4],
                                         uint64_t descriptor, bool accumulate) {
  static_assert(kN == 8 || kN == 16 || kN == 24 || kN == 32 || kN == 48 || kN == 64 || kN == 96 ||
                kN == 128 || kN == 256);
#if defined(QLK_EMULATE_CUDA)
  emulation::issue_wgmma<kBFloat16, kN>(sums, left, descriptor, accumulate);
#else
  if constexpr (kN == 8)
    QLK_WGMMA_EITHER(8, 4, "%4", "%5", "%6", "%7", "%8", "%9");
  else if constexpr (kN == 16)
    QLK_WGMMA_EITHER(16, 8, "%8", "%9", "%10", "%11", "%12", "%13");
  else if constexpr (kN == 24)
    QLK_WGMMA_EITHER(24, 12, "%12", "%13", "%14", "%15", "%16", "%17");
  else if constexpr (kN == 32)
    QLK_WGMMA_EITHER(32, 16, "%16", "%17", "%18", "%19", "%20", "%21");
  else if constexpr (kN == 48)
    QLK_WGMMA_EITHER(48, 24, "%24", "%25", "%26", "%27", "%28", "%29");
  else if constexpr (kN == 64)
    QLK_WGMMA_EITHER(64, 32, "%32", "%33", "%34", "%35", "%36", "%37");
  else if constexpr (kN == 96)
    QLK_WGMMA_EITHER(96, 48, "%48", "%49", "%50", "%51", "%52", "%53");
  else if constexpr (kN == 128)
    QLK_WGMMA_EITHER(128, 64, "%64", "%65", "%66", "%67", "%68", "%69");
  else
    QLK_WGMMA_EITHER(256, 128, "%128", "%129", "%130", "%131", "%132", "%133");
#endif
}

#if !defined(QLK_EMULATE_CUDA)
#undef QLK_SUMS_4
#undef QLK_SUMS_8
#undef QLK_SUMS_12
#undef QLK_SUMS_16
#undef QLK_SUMS_24
#undef QLK_SUMS_32
#undef QLK_SUMS_48
#undef QLK_SUMS_64
#undef QLK_SUMS_128
#undef QLK_NAMES_4
#undef QLK_NAMES_8
#undef QLK_NAMES_12
#undef QLK_NAMES_16
#undef QLK_NAMES_24
#undef QLK_NAMES_32
#undef QLK_NAMES_48
#undef QLK_NAMES_64
#undef QLK_NAMES_128
#undef QLK_WGMMA
#undef QLK_WGMMA_EITHER
#endif

}  // namespace qlk::ptx
