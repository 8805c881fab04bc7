// The adapter's products with mma.sync, in one pass over a tall matrix: the gradient dataᵀ left,
// which sums over tokens, and u = data · right, which sums over columns; both, or one of them.
//
// A block takes kColumns columns of a slice of the tokens, a warp kWarpColumns of them, kTokens
// tokens at a time, and up to 64 ranks: more of them take several blocks, which find all but the
// first's data in L2. The gradient of a warp's columns stays in its registers, and so does its part
// of `right`; its sums of u go to shared memory, where those of all warps are added. Slices leave
// partial sums behind, which partial_sums.cu adds in their order: no atomics, and the same bits in
// every run.
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"

namespace qlk {
namespace {

using cuda::LowRankGradientParams;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTokens = static_cast<int>(cuda::kGradientTokens);
// As many as leave room for two blocks of few ranks, and for one of many where a block may have 99
// KB.
constexpr int kStages = 3;

// Sizes of a block of kRanks ranks, and where things lie in shared memory.
template <int kRanks, bool kWithGradient, bool kWithU>
struct Layout {
  static constexpr int kColumns =
      static_cast<int>(cuda::low_rank_gradient_tile(kRanks, kWithGradient&& kWithU));
  static constexpr int kWarpColumns = kColumns / kWarps, kSteps = kWarpColumns / 16;
  // 16 bytes more than the elements: the rows that an ldmatrix reads then meet in no bank.
  static constexpr int kRowBytes = kColumns * 2 + 16, kStageBytes = kTokens * kRowBytes;
  static constexpr int kParts = kColumns / kVector;  // 16-byte parts of a row
  static constexpr int kRowStep = kThreads / kParts, kRows = kTokens / kRowStep;

  static constexpr int kLeftRowBytes = kRanks * 2 + 16;
  static constexpr int kLeftBytes = kWithGradient ? kTokens * kLeftRowBytes : 0;
  // 8 floats more: the two-float stores of four rows meet in no bank.
  static constexpr int kSumPitch = kRanks + 8, kSumFloats = kWarps * kTokens * kSumPitch;
  // One tile's sums are added up while the next one's come in. Those of 64 ranks have room only
  // once, and are added up at once.
  static constexpr int kSumBuffers = kRanks == 64 ? 1 : 2;
  static constexpr int kLeft = kStages * kStageBytes, kSums = kLeft + 2 * kLeftBytes;
  static constexpr int kBytes = kSums + (kWithU ? kSumBuffers * kSumFloats * 4 : 0);
  static_assert(kBytes <= 99 << 10, "what every architecture from sm_80 on lets a block have");
};

struct Launch {
  LowRankGradientParams p;
  int rank_chunks = 1;  // of kRanks ranks; blocks of the same data follow each other
  bool vector = false;  // rows of data begin at 16-byte boundaries
};

// Copies tile `token0` of data to a stage; tokens and columns that do not exist become zeros.
template <class Shape>
__device__ __forceinline__ void issue(const Launch& launch, int64_t token0, int column0,
                                      unsigned char* stage) {
  const LowRankGradientParams& p = launch.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int part = thread % Shape::kParts, column = column0 + part * kVector;
  const auto* data = static_cast<const uint16_t*>(p.data);
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
    const int row = thread / Shape::kParts + i * Shape::kRowStep;
    const int64_t token = token0 + row;
    const bool inside = token < p.tokens && column < p.cols;
    const uint16_t* source = data + (inside ? token * p.cols + column : 0);
    unsigned char* target = stage + row * Shape::kRowBytes + part * 16;
    if (launch.vector) {
      ptx::copy_async<16>(target, source, inside ? 16 : 0);
    } else {
      // Short code rather than fast: ragged rows are rare.
#pragma unroll 1
      for (int j = 0; j < kVector; ++j)
        reinterpret_cast<uint16_t*>(target)[j] =
            inside && column + j < p.cols ? source[j] : uint16_t{0};
    }
  }
}

// What a thread carries of `left` from global to shared memory.
template <class Shape, int kRanks>
struct LeftPart {
  static constexpr int kCount = kTokens * kRanks / kThreads;
  uint16_t values[kCount];

  __device__ __forceinline__ void load(const LowRankGradientParams& p, int64_t token0, int rank0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int element = static_cast<int>(threadIdx.x) + i * kThreads;
      const int64_t token = token0 + element / kRanks, rank = rank0 + element % kRanks;
      const bool inside = token < p.tokens && rank < p.rank;
      values[i] = inside ? static_cast<const uint16_t*>(p.left)[token * p.rank + rank] : 0;
    }
  }

  __device__ __forceinline__ void store(unsigned char* left) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int element = static_cast<int>(threadIdx.x) + i * kThreads;
      unsigned char* row = left + element / kRanks * Shape::kLeftRowBytes;
      reinterpret_cast<uint16_t*>(row)[element % kRanks] = values[i];
    }
  }
};

// `right` of a warp's columns as right operands of u's products.
template <DType kDType, int kRanks, int kSteps>
struct RightPart {
  uint32_t values[kSteps][kRanks / 8][2];

  __device__ __forceinline__ void load(const LowRankGradientParams& p, int column0, int rank0) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int r = 0; r < kRanks / 8; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float pair[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int64_t column = column0 + step * 16 + 2 * t + 8 * i + j,
                          rank = rank0 + r * 8 + g;
            const bool inside = column < p.cols && rank < p.rank;
            const int64_t index =
                p.right_rank_major ? rank * p.cols + column : column * p.rank + rank;
            pair[j] = inside ? load_any(p.right, p.right_dtype, index) : 0.0f;
          }
          values[step][r][i] = Element<kDType>::pack(pair[0], pair[1]);
        }
  }
};

// The tile's products for the warp's columns: gradient += tileᵀ left; sums = tile · right.
template <class Shape, bool kBFloat16, int kRanks, bool kWithGradient, bool kWithU, class Right>
__device__ __forceinline__ void multiply_tile(const unsigned char* stage, const unsigned char* left,
                                              const Right& right,
                                              float (&gradient)[Shape::kSteps][kRanks / 8][4],
                                              float (&sums)[kRanks / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  // left [16 tokens, 8 ranks] as right operands, two of them by one ldmatrix.
  uint32_t left_pairs[kRanks / 16][4];
  if constexpr (kWithGradient) {
#pragma unroll
    for (int r = 0; r < kRanks / 16; ++r)
      ptx::load_matrices<true>(left_pairs[r],
                               left + lane % 16 * Shape::kLeftRowBytes + (r * 2 + lane / 16) * 16);
  }
  const unsigned char* warp_stage = stage + warp * Shape::kWarpColumns * 2;
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
    if constexpr (kWithGradient) {
      uint32_t transposed[4];
      const int token = lane % 8 + lane / 16 * 8, column = step * 16 + lane / 8 % 2 * 8;
      ptx::load_matrices<true>(transposed, warp_stage + token * Shape::kRowBytes + column * 2);
#pragma unroll
      for (int r = 0; r < kRanks / 8; ++r) {
        const uint32_t pair[2] = {left_pairs[r / 2][r % 2 * 2], left_pairs[r / 2][r % 2 * 2 + 1]};
        ptx::multiply_add<kBFloat16>(gradient[step][r], transposed, pair);
      }
    }
    if constexpr (kWithU) {
      uint32_t tile[4];
      ptx::load_matrices<false>(
          tile, warp_stage + lane % 16 * Shape::kRowBytes + (step * 16 + lane / 16 * 8) * 2);
#pragma unroll
      for (int r = 0; r < kRanks / 8; ++r)
        ptx::multiply_add<kBFloat16>(sums[r], tile, right.values[step][r]);
    }
  }
}

// Adds the warps' sums of the tile at token0 in their order.
template <class Shape, int kRanks>
__device__ __forceinline__ void store_u(const LowRankGradientParams& p, const float* sums,
                                        int64_t token0, int rank0, int slice, int warps) {
  constexpr int kPitch = Shape::kSumPitch;
#pragma unroll
  for (int i = 0; i < kTokens * kRanks / kThreads; ++i) {
    const int element = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = element / kRanks, rank = element % kRanks;
    const float* first = sums + row * kPitch + rank;
    float sum = *first;
#pragma unroll
    for (int other = 1; other < kWarps; ++other)
      if (other < warps) sum = __fadd_rn(sum, first[other * kTokens * kPitch]);
    if (token0 + row < p.tokens && rank0 + rank < p.rank)
      p.u_partials[(slice * p.tokens + token0 + row) * p.rank + rank0 + rank] = sum;
  }
}

// The thread's own parts of a tile, which it copied to the stage itself.
template <class Shape>
__device__ __forceinline__ void store_copy(const LowRankGradientParams& p,
                                           const unsigned char* stage, int64_t token0,
                                           int column0) {
  const int thread = static_cast<int>(threadIdx.x);
  const int part = thread % Shape::kParts, column = column0 + part * kVector;
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
    const int row = thread / Shape::kParts + i * Shape::kRowStep;
    if (token0 + row < p.tokens && column < p.cols)
      ptx::store_global(
          reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.copy) + (token0 + row) * p.copy_stride +
                                   column),
          *reinterpret_cast<const uint4*>(stage + row * Shape::kRowBytes + part * 16));
  }
}

// Grid: slices of columns times chunks of ranks, slices of tokens.
template <DType kDType, int kRanks, bool kWithGradient, bool kWithU>
__global__ __launch_bounds__(kThreads, kRanks == 16 ? 2 : 1) void low_rank_gradient_kernel(
    const __grid_constant__ Launch launch) {
  constexpr bool kBFloat16 = kDType == DType::kBFloat16;
  using Shape = Layout<kRanks, kWithGradient, kWithU>;
  constexpr int kSteps = Shape::kSteps, kStageBytes = Shape::kStageBytes;
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const left = shared + Shape::kLeft;
  auto* const warp_sums = reinterpret_cast<float*>(shared + Shape::kSums);
  const LowRankGradientParams& p = launch.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int slice = static_cast<int>(blockIdx.x) / launch.rank_chunks;
  const int rank0 = static_cast<int>(blockIdx.x) % launch.rank_chunks * kRanks;
  const int column0 = slice * Shape::kColumns, warp_column = column0 + warp * Shape::kWarpColumns;
  // The warps that have columns at all.
  const auto warps = static_cast<int>(
      min(int64_t{kWarps}, ceil_div(p.cols - column0, int64_t{Shape::kWarpColumns})));
  const int64_t n_tiles = ceil_div(p.tokens, int64_t{kTokens});
  const int64_t first = n_tiles * blockIdx.y / p.token_slices;
  const int64_t last = n_tiles * (blockIdx.y + 1) / p.token_slices;

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (first + s < last)
      issue<Shape>(launch, (first + s) * kTokens, column0, shared + s * kStageBytes);
    ptx::commit_copies();
  }
  LeftPart<Shape, kRanks> left_part;
  if constexpr (kWithGradient) {
    left_part.load(p, first * kTokens, rank0);
    left_part.store(left);
    left_part.load(p, (first + 1) * kTokens, rank0);
  }
  RightPart<kDType, kRanks, kSteps> right;
  if constexpr (kWithU) right.load(p, warp_column, rank0);

  float gradient[kSteps][kRanks / 8][4] = {};
  int stage = 0, parity = 0;
  for (int64_t tile = first; tile < last; ++tile) {
    ptx::wait_copies<kStages - 2>();
    // The tile is there for all, and all are done with the one that is overwritten next.
    __syncthreads();
    if constexpr (kWithGradient) {
      left_part.store(left + (parity ^ 1) * Shape::kLeftBytes);
      left_part.load(p, (tile + 2) * kTokens, rank0);
    }
    const int next = stage == 0 ? kStages - 1 : stage - 1;
    if (tile + kStages - 1 < last)
      issue<Shape>(launch, (tile + kStages - 1) * kTokens, column0, shared + next * kStageBytes);
    ptx::commit_copies();
    const unsigned char* const here = shared + stage * kStageBytes;
    if constexpr (kWithU) {
      if (Shape::kSumBuffers == 2 && tile > first)
        store_u<Shape, kRanks>(p, warp_sums + (parity ^ 1) * Shape::kSumFloats,
                               (tile - 1) * kTokens, rank0, slice, warps);
      if (p.copy && rank0 == 0) store_copy<Shape>(p, here, tile * kTokens, column0);
    }
    if (warp < warps) {
      float sums[kRanks / 8][4] = {};
      multiply_tile<Shape, kBFloat16, kRanks, kWithGradient, kWithU>(
          here, left + parity * Shape::kLeftBytes, right, gradient, sums);
      if constexpr (kWithU) {
        float* mine = warp_sums + (Shape::kSumBuffers == 2 ? parity * Shape::kSumFloats : 0) +
                      warp * kTokens * Shape::kSumPitch;
#pragma unroll
        for (int r = 0; r < kRanks / 8; ++r)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float2*>(mine + (g + 8 * half) * Shape::kSumPitch + r * 8 + 2 * t) =
                make_float2(sums[r][2 * half], sums[r][2 * half + 1]);
      }
    }
    if constexpr (kWithU && Shape::kSumBuffers == 1) {
      __syncthreads();
      store_u<Shape, kRanks>(p, warp_sums, tile * kTokens, rank0, slice, warps);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= 1;
  }
  ptx::wait_copies<0>();
  if constexpr (kWithU && Shape::kSumBuffers == 2) {
    __syncthreads();
    if (first < last)
      store_u<Shape, kRanks>(p, warp_sums + (parity ^ 1) * Shape::kSumFloats, (last - 1) * kTokens,
                             rank0, slice, warps);
  }

  if constexpr (!kWithGradient) return;
  float* const out = p.gradient_partials + blockIdx.y * p.cols * p.rank;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int r = 0; r < kRanks / 8; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = warp_column + step * 16 + g + 8 * (i / 2);
        const int rank = rank0 + r * 8 + 2 * t + i % 2;
        if (column < p.cols && rank < p.rank)
          out[p.rank_major ? rank * p.cols + column : column * p.rank + rank] =
              gradient[step][r][i];
      }
}

template <DType kDType, int kRanks, bool kWithGradient, bool kWithU>
cudaError_t launch_kernel(const Launch& call, cudaStream_t stream) {
  using Shape = Layout<kRanks, kWithGradient, kWithU>;
  const int64_t slices = ceil_div(call.p.cols, int64_t{Shape::kColumns});
  const dim3 grid{static_cast<unsigned>(slices * call.rank_chunks),
                  static_cast<unsigned>(call.p.token_slices), 1};
  return launch(low_rank_gradient_kernel<kDType, kRanks, kWithGradient, kWithU>, grid,
                dim3{kThreads, 1, 1}, Shape::kBytes, stream, call);
}

template <DType kDType, int kRanks>
cudaError_t launch_for(const Launch& call, cudaStream_t stream) {
  if (!call.p.left) return launch_kernel<kDType, kRanks, false, true>(call, stream);
  if (call.p.right) return launch_kernel<kDType, kRanks, true, true>(call, stream);
  return launch_kernel<kDType, kRanks, true, false>(call, stream);
}

template <DType kDType>
cudaError_t launch_for_ranks(const Launch& call, cudaStream_t stream) {
  switch (cuda::low_rank_gradient_ranks(call.p.rank)) {
    case 16:
      return launch_for<kDType, 16>(call, stream);
    case 32:
      return launch_for<kDType, 32>(call, stream);
    default:
      return launch_for<kDType, 64>(call, stream);
  }
}

constexpr int64_t kLargest = (int64_t{1} << 31) - 1;

}  // namespace

int cuda::launch_low_rank_gradient(const LowRankGradientParams& p, void* stream) {
  if (p.tokens == 0 || p.cols == 0 || p.rank == 0) return cudaSuccess;
  if ((!p.left && !p.right) || p.token_slices < 1 || p.token_slices > 65535 ||
      p.cols > kLargest / p.rank || p.tokens > kLargest / p.rank)
    return cudaErrorInvalidValue;
  const int64_t ranks = low_rank_gradient_ranks(p.rank);
  const Launch call{p, static_cast<int>(ceil_div(p.rank, ranks)),
                    p.cols % kVector == 0 && is_aligned(p.data)};
  if (p.copy && (!p.right || !call.vector || !is_aligned(p.copy) || p.copy_stride % kVector != 0 ||
                 p.copy_stride < p.cols))
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kBFloat16) return launch_for_ranks<DType::kBFloat16>(call, on);
  if (p.dtype == DType::kFloat16) return launch_for_ranks<DType::kFloat16>(call, on);
  return cudaErrorInvalidValue;
}

}  // namespace qlk
