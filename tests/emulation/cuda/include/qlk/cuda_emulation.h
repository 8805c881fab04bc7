// CUDA C++ as far as csrc/kernels uses it, for a C++20 compiler: tests only.
//
// qlk/cuda/device.cuh includes this in place of the CUDA runtime where QLK_EMULATE_CUDA is defined.
// The twins of PTX instructions stand beside the instructions, in qlk/cuda/ptx*.cuh.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "qlk/cuda_engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

using dim3 = qlk::emulation::Dim3;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx qlk::emulation::thread_index
#define blockIdx qlk::emulation::block_index
#define blockDim qlk::emulation::block_size
#define gridDim qlk::emulation::grid_size

using std::max;
using std::min;

// A static that the engine fills before every block; ASAN gives it red zones.
#define SHARED_ARRAY(type, name, dims)                            \
  alignas(128) static type name dims;                             \
  static const bool name##_is_registered =                        \
      (qlk::emulation::register_shared(name, sizeof name), true); \
  (void)name##_is_registered
#define DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(qlk::emulation::dynamic_shared(false))
#define SWIZZLED_SHARED(type, name) \
  type* const name = static_cast<type*>(qlk::emulation::dynamic_shared(true))

#define __syncthreads() qlk::emulation::sync_threads(__LINE__)
inline void __syncwarp(unsigned mask = 0xffffffffu) { qlk::emulation::sync_warp(mask, 0); }
inline void __threadfence() {}

namespace qlk {

namespace emulation {

template <class... Parameters, class... Arguments>
void enqueue_call(bool overlaps, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                  size_t shared_bytes, Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  enqueue({grid, block, shared_bytes,
           [](void* context) {
             const Call& c = *static_cast<const Call*>(context);
             std::apply(c.kernel, c.arguments);
           },
           [](void* context) { delete static_cast<Call*>(context); },
           new Call{kernel, std::tuple<Parameters...>(arguments...)}, overlaps});
}

}  // namespace emulation

// Launches run later: see enqueue.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Arguments... arguments) {
  emulation::enqueue_call(false, kernel, grid, block, shared_bytes, arguments...);
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  emulation::enqueue_call(true, kernel, grid, block, shared_bytes, arguments...);
  return cudaSuccess;
}

// So few that persistent blocks must loop.
inline int multiprocessor_count() { return 1; }

}  // namespace qlk

// Warp shuffles and votes. The value of a lane outside the mask is undefined: here, all ones.
template <class T>
T qlk_shuffle(const char* operation, unsigned mask, T value, int source) {
  const qlk::emulation::Exchange exchange(operation, mask, &value, sizeof value);
  T result;
  if (!exchange.read(source, &result)) std::memset(&result, 0xff, sizeof result);
  return result;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = qlk::emulation::lane_index();
  return qlk_shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = qlk::emulation::lane_index();
  const int source = lane ^ lane_mask;
  // A lane of a later segment is out of reach; one of an earlier segment is not.
  const bool reachable = source < (lane & ~(width - 1)) + width;
  return qlk_shuffle("__shfl_xor_sync", mask, value, reachable ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = qlk::emulation::lane_index();
  const int source = lane + static_cast<int>(delta);
  const bool reachable = source < (lane & ~(width - 1)) + width;
  return qlk_shuffle("__shfl_down_sync", mask, value, reachable ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const qlk::emulation::Exchange exchange("__ballot_sync", mask, &predicate, sizeof predicate);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    int theirs = 0;
    if (exchange.read(lane, &theirs) && theirs) result |= 1u << lane;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

// Relaxed: an atomic orders nothing else.
template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// Arithmetic with its rounding in the name: the compiler is called with -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline double __ull2double_rn(unsigned long long value) { return static_cast<double>(value); }
inline float __double2float_rn(double value) { return static_cast<float>(value); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline int __clzll(long long value) {
  return std::countl_zero(static_cast<unsigned long long>(value));
}
