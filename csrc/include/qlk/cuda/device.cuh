// What every CUDA source includes first: the runtime, shared memory, launches.
//
// Kernels keep to what tests/emulation/cuda can run on a CPU: shared memory through the two macros
// below, launches through launch(), explicit masks, PTX only through qlk/cuda/ptx.cuh.
#pragma once

#include <cstdint>

#if defined(QLK_EMULATE_CUDA)
#include "qlk/cuda_emulation.h"
#else
#include <cuda_runtime.h>

// SHARED_ARRAY(float, scales, [2][64]); is a static shared array.
#define SHARED_ARRAY(type, name, dims) __shared__ __align__(16) type name dims
// The launch's dynamic shared memory as `type*`. One extern array for every type: nvcc wants it so.
#define DYNAMIC_SHARED(type, name)                                   \
  extern __shared__ __align__(128) unsigned char qlk_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(qlk_shared_bytes)

namespace qlk {

// Above this much dynamic shared memory a kernel must ask.
constexpr size_t kDefaultSharedBytes = 48 << 10;

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...) and the error it left, if any.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    // Per device, cheap, and legal during graph capture: not worth a cache.
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
}

// Of the current device.
inline int multiprocessor_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

}  // namespace qlk
#endif

namespace qlk {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// log2 of a power of two, or -1.
inline int power_shift(int64_t value) {
  int shift = 0;
  while ((int64_t{1} << shift) < value) ++shift;
  return int64_t{1} << shift == value ? shift : -1;
}

}  // namespace qlk
