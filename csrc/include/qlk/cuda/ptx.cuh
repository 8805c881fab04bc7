// Every PTX instruction that the kernels use, as a function, with its twin for the emulation
// beside it. Semantics: "Parallel Thread Execution ISA" 9.0, by the section named at each.
#pragma once

#include "qlk/cuda/device.cuh"
#if defined(QLK_EMULATE_CUDA)
#include "qlk/float16.h"
#endif

namespace qlk::ptx {

// prmt.b32 (9.7.8.7), default mode: byte i of the result is byte (selector >> 4i) & 7 of {high,
// low}, or its sign bit eight times where bit 3 of that selector nibble is set.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(QLK_EMULATE_CUDA)
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#endif
}

// cvt.rn.bf16x2.f32 (9.7.9.22): two fp32 to bf16, nearest even; `low` in bits 0 ... 15.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if defined(QLK_EMULATE_CUDA)
  return uint32_t{float_to_bf16(high)} << 16 | float_to_bf16(low);
#else
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#endif
}

// cvt.rn.f16x2.f32: the same to fp16.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
#if defined(QLK_EMULATE_CUDA)
  return uint32_t{float_to_half(high)} << 16 | float_to_half(low);
#else
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#endif
}

// cvt.f32.f16, exact.
__device__ __forceinline__ float f16_to_float(uint16_t half) {
#if defined(QLK_EMULATE_CUDA)
  return half_to_float(half);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
  return result;
#endif
}

// ld.global.nc with L1::no_allocate (9.7.9.9): for what is read once. `source` aligned to its size.
__device__ __forceinline__ uint32_t load_once(const uint32_t* source) {
#if defined(QLK_EMULATE_CUDA)
  return *source;
#else
  uint32_t value;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(source));
  return value;
#endif
}
__device__ __forceinline__ uint4 load_once(const uint4* source) {
#if defined(QLK_EMULATE_CUDA)
  return *source;
#else
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(source));
  return v;
#endif
}

// st.global.v4: 16 bytes to an aligned address. A pointer out of a structure is a generic one to
// the compiler, and a generic store checks where it points.
__device__ __forceinline__ void store_global(uint4* target, uint4 v) {
#if defined(QLK_EMULATE_CUDA)
  *target = v;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// ld.global.cg: from L2, where other multiprocessors' writes are; L1 may hold what was there
// before.
__device__ __forceinline__ float load_from_l2(const float* source) {
#if defined(QLK_EMULATE_CUDA)
  return *source;
#else
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(source) : "memory");
  return value;
#endif
}
__device__ __forceinline__ uint4 load_from_l2(const uint4* source) {
#if defined(QLK_EMULATE_CUDA)
  return *source;
#else
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source)
               : "memory");
  return v;
#endif
}

// The address of shared memory within it, as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
#if defined(QLK_EMULATE_CUDA)
  return emulation::window_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// cp.async (9.7.9.25.3.1): kBytes from global to shared memory, not waited for; the first
// `source_bytes` of them are read, the rest of the destination is zeroed. Both pointers are aligned
// to kBytes. 16 bytes bypass L1.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global,
                                           int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(QLK_EMULATE_CUDA)
  if (!emulation::in_shared(shared, kBytes)) emulation::fail("cp.async outside shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes)
    emulation::fail("cp.async of %d bytes to %p from %p: not aligned", kBytes, shared, global);
  // What a reader finds that does not wait. Word by word: TSAN overlooks a memset that is one
  // store.
  for (int i = 0; i < kBytes / 4; ++i) static_cast<uint32_t*>(shared)[i] = 0xffffffffu;
  emulation::queue_copy({shared, global, kBytes, source_bytes});
#else
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
#endif
}

// cp.async.commit_group (9.7.9.25.3.2): the copies since the last commit become a group.
__device__ __forceinline__ void commit_copies() {
#if defined(QLK_EMULATE_CUDA)
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// cp.async.wait_group (9.7.9.25.3.3): waits until at most kPending of this thread's groups are
// under way. Other threads see the data after a barrier only.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if defined(QLK_EMULATE_CUDA)
  emulation::AsyncCopy copy;
  while (emulation::next_completed_copy(kPending, &copy)) {
    for (int i = 0; i < copy.bytes / 4; ++i)
      static_cast<uint32_t*>(copy.destination)[i] =
          4 * i < copy.source_bytes ? static_cast<const uint32_t*>(copy.source)[i] : 0;
  }
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16 (9.7.14.5.15): four 8 x 8 matrices of 16-bit elements.
// Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes; it receives, of matrix j in
// result[j], elements 2 (l % 4) and the next of row l / 4. kTranspose: of the transposed matrices.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4], const void* shared_row) {
#if defined(QLK_EMULATE_CUDA)
  if (!emulation::in_shared(shared_row, 16) || reinterpret_cast<uintptr_t>(shared_row) % 16)
    emulation::fail("ldmatrix of a row at %p: not 16 aligned bytes of shared memory", shared_row);
  // Read on arrival: a rendezvous first would hide a missing __syncwarp.
  uint16_t row[8];
  std::memcpy(row, shared_row, sizeof row);
  const emulation::Exchange exchange(kTranspose ? "ldmatrix.trans" : "ldmatrix", kAllLanes, row,
                                     sizeof row);
  const int lane = emulation::lane_index();
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int p = 0; p < 2; ++p) {
      const int r = kTranspose ? 2 * (lane % 4) + p : lane / 4;
      const int c = kTranspose ? lane / 4 : 2 * (lane % 4) + p;
      exchange.read(8 * j + r, row);
      pair[p] = row[c];
    }
    result[j] = uint32_t{pair[1]} << 16 | pair[0];
  }
#else
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
  }
#endif
}

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32 (9.7.14.5.8): sum += left · right
// with left [16, 16], right [16, 8], fp32 sums of products that are exact. With g = lane / 4,
// t = lane % 4: left[i] holds row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next; right[i]
// holds rows 2t + 8 i and the next, column g; sum[i] is row g + 8 (i / 2), column 2t + i % 2.
template <bool kBFloat16>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&left)[4],
                                             const uint32_t (&right)[2]) {
#if defined(QLK_EMULATE_CUDA)
  uint32_t mine[6] = {left[0], left[1], left[2], left[3], right[0], right[1]};
  const emulation::Exchange exchange(kBFloat16 ? "mma.bf16" : "mma.f16", kAllLanes, mine,
                                     sizeof mine);
  const auto value = [](uint32_t pair, int p) {
    const auto bits = static_cast<uint16_t>(p ? pair >> 16 : pair);
    return kBFloat16 ? bf16_to_float(bits) : half_to_float(bits);
  };
  const int g = emulation::lane_index() / 4, t = emulation::lane_index() % 4;
  double exact[4] = {sum[0], sum[1], sum[2], sum[3]};
  for (int k = 0; k < 16; k += 2) {
    // Columns k, k + 1 of both rows come from one lane each, rows k, k + 1 of both columns as well.
    uint32_t row[6], column[2][6];
    exchange.read(g * 4 + k % 8 / 2, row);
    for (int c = 0; c < 2; ++c) exchange.read((2 * t + c) * 4 + k % 8 / 2, column[c]);
    for (int i = 0; i < 4; ++i)
      for (int p = 0; p < 2; ++p)
        exact[i] +=
            double{value(row[2 * (k / 8) + i / 2], p)} * double{value(column[i % 2][4 + k / 8], p)};
  }
  for (int i = 0; i < 4; ++i) sum[i] = static_cast<float>(exact[i]);
#else
  if constexpr (kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  }
#endif
}

}  // namespace qlk::ptx
