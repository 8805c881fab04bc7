// What follows the main loop of quantized_matmul_sm80.cu: splits added up, the adapter's term, bias
// and the one rounding. A warp has 16 rows of the weight and kTokenTiles times eight tokens, as
// mma.sync leaves them: with g = lane / 4, t = lane % 4, sums[tile][i] is row g + 8 (i / 2), token
// 8 tile + 2t + i % 2.
#pragma once

#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"

namespace qlk {

// Two neighbouring elements of a row of `rank`, rows `stride` apart, rounded to the operands'
// dtype; zeros outside.
template <DType kDType>
__device__ __forceinline__ uint32_t load_pair(const void* source, DType dtype, int64_t row,
                                              int64_t rows, int64_t stride, int64_t column,
                                              int64_t rank) {
  const bool inside = row < rows;
  const float low = inside && column < rank ? load_any(source, dtype, row * stride + column) : 0.0f;
  const float high =
      inside && column + 1 < rank ? load_any(source, dtype, row * stride + column + 1) : 0.0f;
  return Element<kDType>::pack(low, high);
}

// sums += scaling * lora_b xaᵀ for the warp's 16 rows.
template <DType kDType, int kTokenTiles>
__device__ __forceinline__ void add_adapter(const cuda::FusedMatmulParams& p, int64_t warp_row,
                                            int64_t token0, float (&sums)[kTokenTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  // lora_b is read again for every eight tokens: the registers hold the sums of all of them
  // already.
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    float part[4] = {};
#pragma unroll 1
    for (int64_t r = 2 * t; r - 2 * t < p.rank; r += 16) {
      uint32_t left[4], right[2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[i] = load_pair<kDType>(p.lora_b, p.lora_b_dtype, warp_row + g + 8 * (i % 2),
                                    p.weight.rows, p.rank, r + 8 * (i / 2), p.rank);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        right[i] = load_pair<kDType>(p.xa, kDType, token0 + tile * 8 + g, p.tokens, p.xa_stride,
                                     r + 8 * i, p.rank);
      ptx::multiply_add<kDType == DType::kBFloat16>(part, left, right);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[tile][i] = __fmaf_rn(p.scaling, part[i], sums[tile][i]);
  }
}

// Leaves the sums of this split behind; the last block of a tile to do so adds those of all splits,
// in their order, and returns true.
template <int kThreads, int kTokenTiles>
__device__ __forceinline__ bool reduce_splits(const cuda::FusedMatmulParams& p, int tile_index,
                                              float (&sums)[kTokenTiles][4]) {
  SHARED_ARRAY(uint32_t, ticket, [1]);
  constexpr int kSums = kTokenTiles * 4;
  const int64_t size = int64_t{kSums} * kThreads;
  float* mine = p.partials + (int64_t{tile_index} * p.splits + blockIdx.z) * size + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kSums; ++i) mine[i * kThreads] = sums[i / 4][i % 4];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *ticket = atomicAdd(p.tickets + tile_index, 1u);
  __syncthreads();
  if (*ticket + 1 != static_cast<uint32_t>(p.splits)) return false;
  __threadfence();
  if (threadIdx.x == 0) p.tickets[tile_index] = 0;
  const float* first = p.partials + int64_t{tile_index} * p.splits * size + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i / 4][i % 4] = ptx::load_from_l2(first + i * kThreads);
  for (int split = 1; split < p.splits; ++split)
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      sums[i / 4][i % 4] =
          __fadd_rn(sums[i / 4][i % 4], ptx::load_from_l2(first + split * size + i * kThreads));
  return true;
}

// y of the warp's rows and tokens.
template <DType kDType, int kTokenTiles>
__device__ __forceinline__ void store_tile(const cuda::FusedMatmulParams& p, int64_t warp_row,
                                           int64_t token0, const float (&sums)[kTokenTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = warp_row + lane / 4 + 8 * half;
    if (row >= p.weight.rows) break;
    const float bias = p.bias ? load_any(p.bias, p.bias_dtype, row) : 0.0f;
    int64_t token = token0 + 2 * (lane % 4);
    auto* y = static_cast<uint16_t*>(p.y) + token * p.weight.rows + row;
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile, token += 8, y += 8 * p.weight.rows) {
      // Without a bias nothing is added: -0 stays.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = sums[tile][2 * half + i];
        if (token + i < p.tokens)
          y[i * p.weight.rows] = Element<kDType>::store(p.bias ? __fadd_rn(sum, bias) : sum);
      }
    }
  }
}

}  // namespace qlk
