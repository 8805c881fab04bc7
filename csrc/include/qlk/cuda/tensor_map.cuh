// Tensor maps: what the tensor memory accelerator of sm_90 must know of a matrix to copy boxes of
// it (qlk/cuda/ptx_sm90.cuh, copy_tensor_2d). Made on the host, passed to a kernel as a
// `const __grid_constant__ TensorMap` parameter.
#pragma once

#include "qlk/cuda/device.cuh"
#if defined(QLK_EMULATE_CUDA)
#include "qlk/cuda_engine_sm90.h"
#else
#include <cuda.h>
#endif

namespace qlk {

// How the 16-byte pieces of a box's rows are exchanged within 8 rows of shared memory; the value is
// the width of a row in bytes. Address bits 4 and up are XORed with bits 7 and up: one bit of them
// for 32 bytes, two for 64, three for 128. Box rows are that wide, and one after another.
enum class Swizzle : int { kNone = 0, k32Bytes = 32, k64Bytes = 64, k128Bytes = 128 };

// `address` in shared memory with its bits exchanged.
__host__ __device__ constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t bits = swizzle == Swizzle::kNone ? 0 : static_cast<uint32_t>(swizzle) - 16;
  return address ^ (address >> 3 & bits);
}

#if defined(QLK_EMULATE_CUDA)
using TensorMap = emulation::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// A row-major matrix of unsigned integers of 1, 2 or 4 bytes (bits are copied, whatever they mean),
// and the box of it that one copy brings.
struct TensorMapSpec {
  const void* data = nullptr;  // at a 16-byte boundary
  int element_bytes = 2;
  int64_t inner = 0, outer = 0;      // columns and rows, 1 ... 2^32
  int64_t row_stride_bytes = 0;      // a multiple of 16 below 2^40
  int box_inner = 0, box_outer = 0;  // columns and rows, 1 ... 256; rows of 16 bytes times n
  Swizzle swizzle = Swizzle::kNone;
};

// CUDA Driver API, cuTensorMapEncodeTiled: what it demands.
inline bool is_encodable(const TensorMapSpec& s) {
  const int64_t box_bytes = int64_t{s.box_inner} * s.element_bytes;
  const bool element = s.element_bytes == 1 || s.element_bytes == 2 || s.element_bytes == 4;
  const bool matrix = s.inner > 0 && s.outer > 0 && s.inner <= int64_t{1} << 32 &&
                      s.outer <= int64_t{1} << 32 && s.row_stride_bytes % 16 == 0 &&
                      s.row_stride_bytes < int64_t{1} << 40 &&
                      (s.outer == 1 || s.row_stride_bytes >= s.inner * s.element_bytes);
  const bool box = s.box_inner > 0 && s.box_inner <= 256 && s.box_outer > 0 && s.box_outer <= 256 &&
                   box_bytes % 16 == 0 &&
                   (s.swizzle == Swizzle::kNone || box_bytes == static_cast<int>(s.swizzle));
  return element && matrix && box && s.data && reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
}

#if defined(QLK_EMULATE_CUDA)

inline cudaError_t make_tensor_map_2d(TensorMap* map, const TensorMapSpec& s) {
  if (!is_encodable(s)) return cudaErrorInvalidValue;
  *map = {static_cast<const unsigned char*>(s.data),
          s.inner,
          s.outer,
          s.row_stride_bytes,
          s.element_bytes,
          s.box_inner,
          s.box_outer,
          static_cast<int>(s.swizzle)};
  return cudaSuccess;
}

#else

// Fills *map. The driver's function is asked for at run time: nothing links against libcuda.
// cudaErrorInvalidValue where the matrix or the box cannot be described, cudaErrorNotSupported
// where the driver knows no tensor maps.
inline cudaError_t make_tensor_map_2d(TensorMap* map, const TensorMapSpec& s) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  struct Found {
    Encode encode = nullptr;
    cudaError_t status = cudaErrorNotSupported;
  };
  static const Found found = [] {
    Found f;
    void* function = nullptr;
    cudaDriverEntryPointQueryResult answer = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    f.status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &answer);
#else
    f.status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &answer);
#endif
    if (f.status == cudaSuccess && (answer != cudaDriverEntryPointSuccess || !function))
      f.status = cudaErrorNotSupported;
    f.encode = reinterpret_cast<Encode>(function);
    return f;
  }();
  if (found.status != cudaSuccess) return found.status;
  if (!is_encodable(s)) return cudaErrorInvalidValue;
  const CUtensorMapDataType type = s.element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : s.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const CUtensorMapSwizzle swizzle = s.swizzle == Swizzle::kNone      ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : s.swizzle == Swizzle::k32Bytes ? CU_TENSOR_MAP_SWIZZLE_32B
                                     : s.swizzle == Swizzle::k64Bytes ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                      : CU_TENSOR_MAP_SWIZZLE_128B;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(s.inner), static_cast<cuuint64_t>(s.outer)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(s.row_stride_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(s.box_inner),
                             static_cast<cuuint32_t>(s.box_outer)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      found.encode(map, type, 2, const_cast<void*>(s.data), sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif

}  // namespace qlk
