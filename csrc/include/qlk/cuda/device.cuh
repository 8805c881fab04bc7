// What every CUDA source includes first: the runtime, shared memory, launches.
//
// Kernels keep to what tests/emulation/cuda can run on a CPU: shared memory through the two macros
// below, launches through launch(), explicit masks, PTX only through qlk/cuda/ptx*.cuh.
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
// The same at a 1024-byte boundary, where swizzled tiles begin (qlk/cuda/tensor_map.cuh).
#define SWIZZLED_SHARED(type, name)                                            \
  extern __shared__ __align__(1024) unsigned char qlk_swizzled_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(qlk_swizzled_shared_bytes)

namespace qlk {

// Above this much dynamic shared memory a kernel must ask.
constexpr size_t kDefaultSharedBytes = 48 << 10;

namespace detail {

// Per device, cheap, and legal during graph capture: not worth a cache.
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), size_t shared_bytes) {
  if (shared_bytes <= kDefaultSharedBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

}  // namespace detail

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...) and the error it left, if any.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  const cudaError_t status = detail::allow_shared(kernel, shared_bytes);
  if (status != cudaSuccess) return status;
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
}

// The same, but the kernel may start while the one before it in the stream still runs, once that
// one's blocks have all called ptx::launch_dependents() or ended. Until it has called
// ptx::wait_for_primary() it must touch nothing that the one before it writes, and write nothing
// that it touches; of what came before that one, everything has been written if that one was
// launched as usual. An ordinary launch where the kernel was compiled for less than sm_90, whose
// code does not wait.
template <class... Parameters, class... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaFuncAttributes compiled;
  cudaError_t status = cudaFuncGetAttributes(&compiled, kernel);
  if (status == cudaSuccess) status = detail::allow_shared(kernel, shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = compiled.ptxVersion >= 90;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = compiled.ptxVersion >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
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
