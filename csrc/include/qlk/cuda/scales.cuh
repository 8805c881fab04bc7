// First-level scales in kernels: as they are stored, or decoded from their 8-bit codes.
#pragma once

#include "qlk/cuda/device.cuh"
#include "qlk/types.h"

namespace qlk {

constexpr int kScaleCodes = 256;

// A ScalesView with log2 of its group size; -1: the size is no power of two.
struct DeviceScales {
  ScalesView view;
  int group_shift = 0;

  DeviceScales() = default;
  explicit DeviceScales(const ScalesView& scales)
      : view(scales), group_shift(power_shift(scales.scale_block_size)) {}

  __device__ __forceinline__ bool nested() const { return view.scale_codes != nullptr; }

  __device__ __forceinline__ float group_absmax(int64_t block) const {
    const int64_t group = group_shift >= 0 ? block >> group_shift : block / view.scale_block_size;
    return view.scale_absmax[group];
  }

  // The scale of a block; `map` is the scale codebook, `offset` the offset, where nested.
  __device__ __forceinline__ float decode(int64_t block, const float* map, float offset) const {
    if (!nested()) return view.absmax[block];
    // Two roundings are the format: a fused multiply-add would give other scales.
    return __fadd_rn(__fmul_rn(map[view.scale_codes[block]], group_absmax(block)), offset);
  }
};

}  // namespace qlk
