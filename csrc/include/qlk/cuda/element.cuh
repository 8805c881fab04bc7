// Elements of the three float dtypes, eight at a time: 16-byte accesses where the pointer allows.
#pragma once

#include "qlk/cuda/ptx.cuh"
#include "qlk/types.h"

namespace qlk {

constexpr int kVector = 8;

template <DType kDType>
struct Element;

template <>
struct Element<DType::kFloat32> {
  using Storage = float;
  static __device__ __forceinline__ float load(float value) { return value; }
  static __device__ __forceinline__ float store(float value) { return value; }
};

template <>
struct Element<DType::kFloat16> {
  using Storage = uint16_t;
  static __device__ __forceinline__ float load(uint16_t bits) { return ptx::f16_to_float(bits); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return ptx::pack_f16(low, high);
  }
  static __device__ __forceinline__ uint16_t store(float value) {
    return static_cast<uint16_t>(pack(value, 0.0f));
  }
};

template <>
struct Element<DType::kBFloat16> {
  using Storage = uint16_t;
  static __device__ __forceinline__ float load(uint16_t bits) {
    return __uint_as_float(uint32_t{bits} << 16);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return ptx::pack_bf16(low, high);
  }
  static __device__ __forceinline__ uint16_t store(float value) {
    return static_cast<uint16_t>(pack(value, 0.0f));
  }
};

template <DType kDType>
using StorageOf = typename Element<kDType>::Storage;

// An element of a dtype that is known at run time only.
__device__ __forceinline__ float load_any(const void* source, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return ptx::f16_to_float(static_cast<const uint16_t*>(source)[index]);
    case DType::kBFloat16:
      return Element<DType::kBFloat16>::load(static_cast<const uint16_t*>(source)[index]);
    default:
      return static_cast<const float*>(source)[index];
  }
}

__device__ __forceinline__ void store_any(void* target, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<uint16_t*>(target)[index] = Element<DType::kFloat16>::store(value);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(target)[index] = Element<DType::kBFloat16>::store(value);
      break;
    default:
      static_cast<float*>(target)[index] = value;
  }
}

// Whether 16-byte accesses at multiples of eight elements from here are aligned.
inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Eight elements at a 16-byte boundary, read once.
template <DType kDType>
__device__ __forceinline__ void load_vector(const StorageOf<kDType>* source,
                                            float (&values)[kVector]) {
  const auto* words = reinterpret_cast<const uint4*>(source);
  if constexpr (kDType == DType::kFloat32) {
    for (int i = 0; i < 2; ++i) {
      const uint4 v = ptx::load_once(words + i);
      values[4 * i] = __uint_as_float(v.x);
      values[4 * i + 1] = __uint_as_float(v.y);
      values[4 * i + 2] = __uint_as_float(v.z);
      values[4 * i + 3] = __uint_as_float(v.w);
    }
  } else {
    const uint4 v = ptx::load_once(words);
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = Element<kDType>::load(static_cast<uint16_t>(pairs[i]));
      values[2 * i + 1] = Element<kDType>::load(static_cast<uint16_t>(pairs[i] >> 16));
    }
  }
}

// The first `count` of eight elements, wherever they are; zeros for the others.
template <DType kDType>
__device__ __forceinline__ void load_some(const StorageOf<kDType>* source, int64_t count,
                                          float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = i < count ? Element<kDType>::load(source[i]) : 0.0f;
}

// Eight elements to a 16-byte boundary.
template <DType kDType>
__device__ __forceinline__ void store_vector(StorageOf<kDType>* target,
                                             const float (&values)[kVector]) {
  if constexpr (kDType == DType::kFloat32) {
    auto* words = reinterpret_cast<uint4*>(target);
    for (int i = 0; i < 2; ++i)
      ptx::store_global(
          words + i,
          make_uint4(__float_as_uint(values[4 * i]), __float_as_uint(values[4 * i + 1]),
                     __float_as_uint(values[4 * i + 2]), __float_as_uint(values[4 * i + 3])));
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = Element<kDType>::pack(values[2 * i], values[2 * i + 1]);
    ptx::store_global(reinterpret_cast<uint4*>(target),
                      make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  }
}

}  // namespace qlk
