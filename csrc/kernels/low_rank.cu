// The down-projection of a LoRA adapter for few tokens: xa = x · lora_aᵀ, a block per rank and
// eight tokens, so that the adapter's row is read once for all of them.
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"
#include "qlk/cuda/ptx_sm90.cuh"

namespace qlk {
namespace {

using cuda::DownProjectionParams;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTokens = 8;

template <DType kDType>
__device__ __forceinline__ float rounded(float value) {
  return Element<kDType>::load(Element<kDType>::store(value));
}

// Eight elements of the adapter from `index` on, rounded to the operands' dtype.
template <DType kDType>
__device__ __forceinline__ void load_adapter(const DownProjectionParams& p, int64_t index,
                                             int64_t count, bool vector, float (&values)[kVector]) {
  if (vector && p.adapter_dtype == DType::kFloat32) {
    load_vector<DType::kFloat32>(static_cast<const float*>(p.adapter) + index, values);
  } else if (vector && p.adapter_dtype == DType::kBFloat16) {
    load_vector<DType::kBFloat16>(static_cast<const uint16_t*>(p.adapter) + index, values);
  } else if (vector) {
    load_vector<DType::kFloat16>(static_cast<const uint16_t*>(p.adapter) + index, values);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values[i] = i < count ? load_any(p.adapter, p.adapter_dtype, index + i) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = rounded<kDType>(values[i]);
}

// Grid: groups of tokens, ranks.
template <DType kDType>
__global__ __launch_bounds__(kThreads, 2) void down_projection_kernel(
    const __grid_constant__ DownProjectionParams p, bool vector) {
  SHARED_ARRAY(float, partial, [kWarps][kTokens]);
  ptx::launch_dependents();
  const int64_t rank = blockIdx.y, token0 = int64_t{blockIdx.x} * kTokens;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const auto* x = static_cast<const uint16_t*>(p.x);
  float sums[kTokens] = {};
  for (int64_t k = thread * kVector; k < p.cols; k += kThreads * kVector) {
    const bool whole = vector && k + kVector <= p.cols;
    float a[kVector];
    load_adapter<kDType>(p, rank * p.cols + k, p.cols - k, whole, a);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      // Uniform; the sum of a token takes the same steps however many there are.
      if (token0 + m >= p.tokens) break;
      float values[kVector];
      const auto* row = x + (token0 + m) * p.cols + k;
      if (whole)
        load_vector<kDType>(row, values);
      else
        load_some<kDType>(row, p.cols - k, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[m] = __fmaf_rn(values[i], a[i], sums[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    for (int step = kWarp / 2; step > 0; step /= 2)
      sums[m] = __fadd_rn(sums[m], __shfl_xor_sync(kAllLanes, sums[m], step));
    if (lane == 0) partial[warp][m] = sums[m];
  }
  __syncthreads();
  if (thread < kTokens && token0 + thread < p.tokens) {
    float sum = partial[0][thread];
    for (int w = 1; w < kWarps; ++w) sum = __fadd_rn(sum, partial[w][thread]);
    static_cast<uint16_t*>(p.result)[(token0 + thread) * p.rank + rank] =
        Element<kDType>::store(sum);
  }
}

}  // namespace

int cuda::launch_down_projection(const DownProjectionParams& p, void* stream) {
  if (p.tokens == 0 || p.rank == 0) return cudaSuccess;
  // A grid's second dimension ends at 65535.
  if (p.rank > 65535 || p.tokens > int64_t{1} << 33) return cudaErrorInvalidValue;
  const dim3 grid{static_cast<unsigned>(ceil_div(p.tokens, int64_t{kTokens})),
                  static_cast<unsigned>(p.rank), 1};
  const bool vector = p.cols % kVector == 0 && is_aligned(p.x) && is_aligned(p.adapter);
  const auto on = static_cast<cudaStream_t>(stream);
  const dim3 block{kThreads, 1, 1};
  if (p.dtype == DType::kBFloat16)
    return launch(down_projection_kernel<DType::kBFloat16>, grid, block, 0, on, p, vector);
  if (p.dtype == DType::kFloat16)
    return launch(down_projection_kernel<DType::kFloat16>, grid, block, 0, on, p, vector);
  return cudaErrorInvalidValue;
}

int cuda::launch_projected_matmul(const DownProjectionParams& projection,
                                  const FusedMatmulParams& matmul, void* stream) {
  const int status = launch_down_projection(projection, stream);
  if (status != cudaSuccess) return status;
  FusedMatmulParams p = matmul;
  // Not without the projection's kernel: whatever comes before it in the stream may write x. That
  // kernel is launched as usual, so when it starts all of that has been written, and a launch that
  // overlaps it may read it. What comes behind starts when the product has ended, and that only
  // ends after it has waited: xa and scratch can be used again.
  p.overlaps = projection.tokens > 0 && projection.rank > 0;
  return launch_fused_matmul(p, stream);
}

}  // namespace qlk
