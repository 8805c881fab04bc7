// quantized_matmul for few tokens: y = x Ŵᵀ with mma.sync, the weights as its left operand, read in
// their storage layout and decoded in registers.
//
// A sum over k may run in any order, so the k that an mma calls 2t, 2t + 1, 2t + 8, 2t + 9 can be
// any four. In a chunk of 64 elements lane t of a quad takes the 16 elements from 16t on, 8 bytes
// of a row; mma m of four takes elements 4m ... 4m + 3 of those, two bytes, and the same four of x.
// A byte is looked up in a table of 256 pairs, one copy per lane, so that no two lanes meet in a
// bank. The table holds the codebook's values; a chunk has one scale, which multiplies its fp32
// sums.
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"
#include "qlk/cuda/scales.cuh"

namespace qlk {
namespace {

using cuda::FusedMatmulParams;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTileN = static_cast<int>(cuda::kFusedTileN);  // 16 rows a warp
constexpr int kTileK = static_cast<int>(cuda::kFusedTileK);
constexpr int kChunk = 64, kChunks = kTileK / kChunk;
constexpr int kCodeRowBytes = kTileK / 2, kCodeBytes = kTileN * kCodeRowBytes;
// 16 bytes more than the elements: rows then begin 4 banks apart, and eight lanes' 16-byte loads
// meet in none.
constexpr int kXRowBytes = kTileK * 2 + 16;
constexpr int kTableBytes = 256 * kWarp * 4;
static_assert(kTileN == kWarps * 16);

template <int kTokenTiles>
struct Stages {
  // As many as let two blocks share a multiprocessor.
  static constexpr int kCount = kTokenTiles <= 2 ? 4 : 3;
  static constexpr int kBytes = kCodeBytes + kTokenTiles * 8 * kXRowBytes;
  static constexpr int kShared = kTableBytes + kCount * kBytes;
};

struct Launch {
  FusedMatmulParams p;
  DeviceScales scales;
  int block_shift = 0;
  int rows = 0, cols = 0, tokens = 0;  // 64-bit ones would not fit into the registers.
};

// Where chunk `part` (16 bytes) of a row of codes lies: neighbouring pairs of rows are turned by
// half a row, so that the 8-byte loads of four rows meet in no bank.
__device__ __forceinline__ int code_offset(int row, int part) {
  return row * kCodeRowBytes + (part ^ (row & 2)) * 16;
}

// What a thread copies of every tile, and the scale that its lane reads: pointers to k = 0, worked
// out once.
template <int kTokenTiles>
struct Sources {
  static constexpr int kParts = kCodeRowBytes / 16, kRows = kTileN * kParts / kThreads;
  static constexpr int kXParts = kTileK / 8, kTokenStep = kThreads / kXParts;
  static constexpr int kTokens = ceil_div(kTokenTiles * 8, kTokenStep);

  const uint8_t* codes[kRows];
  const uint16_t* x[kTokens];
  int code_bytes[kRows], x_bytes[kTokens];  // 16; 0 for rows and tokens that do not exist
  int code_offset, code_k, x_offset, x_k;
  int64_t scale_element;
  int scale_k;  // past the end for rows that do not exist

  __device__ __forceinline__ Sources(const Launch& launch, int row0, int token0) {
    const int thread = static_cast<int>(threadIdx.x);
    const int part = thread % kParts, row = thread / kParts;
    // The rows of a thread are a multiple of four apart: the same turn of their parts.
    static_assert(kThreads / kParts % 4 == 0);
    code_offset = qlk::code_offset(row, part);
    code_k = part * 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int global_row = row0 + row + i * (kThreads / kParts);
      code_bytes[i] = global_row < launch.rows ? 16 : 0;
      codes[i] = launch.p.weight.codes +
                 (int64_t{code_bytes[i] ? global_row : 0} * launch.cols + code_k) / 2;
    }
    const int x_part = thread % kXParts, token = thread / kXParts;
    x_offset = kCodeBytes + token * kXRowBytes + x_part * 16;
    x_k = x_part * 8;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int global_token = token0 + token + i * kTokenStep;
      x_bytes[i] = global_token < launch.tokens ? 16 : 0;
      x[i] = static_cast<const uint16_t*>(launch.p.x) +
             int64_t{x_bytes[i] ? global_token : 0} * launch.cols + x_k;
    }
    // Lane t of quad g has chunk t / 2 of row g + 8 (t % 2).
    const int lane = thread % kWarp;
    const int scale_row = row0 + thread / kWarp * 16 + lane / 4 + 8 * (lane % 2);
    scale_k = scale_row < launch.rows ? lane % 4 / 2 * kChunk : launch.cols;
    scale_element = int64_t{scale_row} * launch.cols + scale_k;
  }

  // Of a copy that reads no byte the address does not matter.
  __device__ __forceinline__ void issue(const Launch& launch, int k0, unsigned char* stage) const {
    const bool code_inside = k0 + code_k < launch.cols, x_inside = k0 + x_k < launch.cols;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      ptx::copy_async<16>(stage + code_offset + i * (kThreads / kParts) * kCodeRowBytes,
                          codes[i] + k0 / 2, code_inside ? code_bytes[i] : 0);
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (kTokenTiles * 8 % kTokenStep == 0 ||
          static_cast<int>(threadIdx.x) < kTokenTiles * 8 * kXParts)
        ptx::copy_async<16>(stage + x_offset + i * kTokenStep * kXRowBytes, x[i] + k0,
                            x_inside ? x_bytes[i] : 0);
  }
};

// A lane's scale of a tile as it is stored.
struct StoredScale {
  float absmax = 0;
  uint32_t code = 0;
};

template <int kTokenTiles>
__device__ __forceinline__ StoredScale load_scale(const Launch& launch,
                                                  const Sources<kTokenTiles>& sources, int k0) {
  StoredScale scale;
  if (sources.scale_k + k0 >= launch.cols) return scale;
  const int64_t block = (sources.scale_element + k0) >> launch.block_shift;
  if (launch.scales.nested()) {
    scale.code = launch.scales.view.scale_codes[block];
    scale.absmax = launch.scales.view.scale_absmax[block >> launch.scales.group_shift];
  } else {
    scale.absmax = launch.scales.view.absmax[block];
  }
  return scale;
}

// Pair of table values for byte `i` of a word of codes; `table` is the lane's own copy, 128 bytes
// between entries.
__device__ __forceinline__ uint32_t look_up(const unsigned char* table, uint32_t word, int i) {
  const uint32_t offset = (i == 0 ? word << 7 : word >> (8 * i - 7)) & 0x7f80u;
  return *reinterpret_cast<const uint32_t*>(table + offset);
}

template <bool kBFloat16, int kTokenTiles>
__device__ __forceinline__ void multiply_tile(const unsigned char* stage,
                                              const unsigned char* table, float scale,
                                              float (&sums)[kTokenTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4, t = lane % 4;
  // Unrolled, the loads of both chunks would not fit into the registers of many tokens.
  constexpr int kUnroll = kTokenTiles > 2 ? 1 : kChunks;
#pragma unroll kUnroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    uint32_t codes[2][2];  // of rows g and g + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = code_offset(warp * 16 + g + 8 * half, 2 * chunk + t / 2) + t % 2 * 8;
      const uint2 words = *reinterpret_cast<const uint2*>(stage + at);
      codes[half][0] = words.x;
      codes[half][1] = words.y;
    }
    float part[kTokenTiles][4] = {};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // mma 2 pair and the next
      uint32_t left[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) left[m][i] = look_up(table, codes[i % 2][pair], 2 * m + i / 2);
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const unsigned char* row = stage + kCodeBytes + (tile * 8 + g) * kXRowBytes;
        const uint4 x =
            *reinterpret_cast<const uint4*>(row + chunk * kChunk * 2 + t * 32 + pair * 16);
        const uint32_t first[2] = {x.x, x.y}, second[2] = {x.z, x.w};
        ptx::multiply_add<kBFloat16>(part[tile], left[0], first);
        ptx::multiply_add<kBFloat16>(part[tile], left[1], second);
      }
    }
    const float scale_g = __shfl_sync(kAllLanes, scale, (lane & ~3) | (2 * chunk));
    const float scale_g8 = __shfl_sync(kAllLanes, scale, (lane & ~3) | (2 * chunk + 1));
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[tile][i] = __fmaf_rn(i < 2 ? scale_g : scale_g8, part[tile][i], sums[tile][i]);
  }
}

// Two neighbouring elements of a row of `rank`, rounded to the operands' dtype; zeros outside.
template <DType kDType>
__device__ __forceinline__ uint32_t load_pair(const void* source, DType dtype, int64_t row,
                                              int64_t rows, int64_t column, int64_t rank) {
  const bool inside = row < rows;
  const float low = inside && column < rank ? load_any(source, dtype, row * rank + column) : 0.0f;
  const float high =
      inside && column + 1 < rank ? load_any(source, dtype, row * rank + column + 1) : 0.0f;
  return Element<kDType>::pack(low, high);
}

// sums += scaling * lora_b xaᵀ for the warp's 16 rows.
template <DType kDType, int kTokenTiles>
__device__ __forceinline__ void add_adapter(const FusedMatmulParams& p, int64_t warp_row,
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
                                    p.weight.rows, r + 8 * (i / 2), p.rank);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        right[i] =
            load_pair<kDType>(p.xa, kDType, token0 + tile * 8 + g, p.tokens, r + 8 * i, p.rank);
      ptx::multiply_add<kDType == DType::kBFloat16>(part, left, right);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[tile][i] = __fmaf_rn(p.scaling, part[i], sums[tile][i]);
  }
}

// Leaves the sums of this split behind; the last block of a tile to do so adds those of all splits,
// in their order, and returns true.
template <int kTokenTiles>
__device__ __forceinline__ bool reduce_splits(const FusedMatmulParams& p, int tile_index,
                                              float (&sums)[kTokenTiles][4]) {
  SHARED_ARRAY(uint32_t, ticket, [1]);
  constexpr int kSums = kTokenTiles * 4;
  const int64_t size = int64_t{kSums} * kThreads;
  float* mine = p.partials + (int64_t{tile_index} * p.splits + blockIdx.y) * size + threadIdx.x;
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

// Grid: row tiles, splits of K, groups of tokens.
template <DType kDType, int kTokenTiles>
__global__ __launch_bounds__(kThreads, 2) void quantized_matmul_sm80_kernel(
    const __grid_constant__ Launch launch) {
  constexpr bool kBFloat16 = kDType == DType::kBFloat16;
  constexpr int kStages = Stages<kTokenTiles>::kCount, kStageBytes = Stages<kTokenTiles>::kBytes;
  SHARED_ARRAY(float, scale_map, [kScaleCodes]);
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const stages = shared + kTableBytes;
  const FusedMatmulParams& p = launch.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row0 = static_cast<int>(blockIdx.x) * kTileN;
  const int token0 = static_cast<int>(blockIdx.z) * kTokenTiles * 8;
  const int warp_row = row0 + warp * 16;
  const int64_t n_tiles = ceil_div(launch.cols, kTileK);
  const auto first = static_cast<int>(n_tiles * blockIdx.y / p.splits);
  const auto last = static_cast<int>(n_tiles * (blockIdx.y + 1) / p.splits);

  const Sources<kTokenTiles> sources(launch, row0, token0);
  StoredScale scales[kStages];
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (first + s < last) {
      sources.issue(launch, (first + s) * kTileK, stages + s * kStageBytes);
      scales[s] = load_scale(launch, sources, (first + s) * kTileK);
    }
    ptx::commit_copies();
  }

  // Meanwhile the tables. A lane works out one byte of each 32 and hands it to all lanes.
  float offset = 0;
  if (launch.scales.nested()) {
    scale_map[threadIdx.x] = launch.scales.view.scale_codebook[threadIdx.x];
    offset = *launch.scales.view.scale_offset;
  }
  auto* table_words = reinterpret_cast<uint32_t*>(shared);
  // Element 2i is the high nibble of byte i, the lower half of the pair.
  const uint32_t own_pair = Element<kDType>::pack(p.weight.codebook[threadIdx.x >> 4],
                                                  p.weight.codebook[threadIdx.x & 15]);
  for (int i = 0; i < kWarp; ++i)
    table_words[(warp * kWarp + i) * kWarp + lane] = __shfl_sync(kAllLanes, own_pair, i);

  float sums[kTokenTiles][4] = {};
  for (int tile = first; tile < last; tile += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (tile + s < last) {
        ptx::wait_copies<kStages - 2>();
        // The tile is there for all, and all are done with the one that is overwritten next.
        __syncthreads();
        constexpr int kAhead = kStages - 1;
        const int next = (s + kAhead) % kStages;
        if (tile + s + kAhead < last) {
          const int k0 = (tile + s + kAhead) * kTileK;
          sources.issue(launch, k0, stages + next * kStageBytes);
          scales[next] = load_scale(launch, sources, k0);
        }
        ptx::commit_copies();
        float scale = scales[s].absmax;
        if (launch.scales.nested())
          scale = __fadd_rn(__fmul_rn(scale_map[scales[s].code], scale), offset);
        multiply_tile<kBFloat16, kTokenTiles>(stages + s * kStageBytes, shared + lane * 4, scale,
                                              sums);
      }
    }
  }
  ptx::wait_copies<0>();

  if (p.splits > 1) {
    const auto tile_index = static_cast<int>(blockIdx.z * gridDim.x + blockIdx.x);
    if (!reduce_splits<kTokenTiles>(p, tile_index, sums)) return;
  }
  if (p.rank > 0) add_adapter<kDType, kTokenTiles>(p, warp_row, token0, sums);
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

template <DType kDType>
cudaError_t launch_for(const Launch& call, cudaStream_t stream) {
  const FusedMatmulParams& p = call.p;
  const int64_t columns = cuda::fused_matmul_tokens(p.tokens);
  const dim3 grid{static_cast<unsigned>(ceil_div(p.weight.rows, int64_t{kTileN})),
                  static_cast<unsigned>(p.splits),
                  static_cast<unsigned>(ceil_div(p.tokens, columns))};
  const dim3 block{kThreads, 1, 1};
  switch (columns) {
    case 8:
      return launch(quantized_matmul_sm80_kernel<kDType, 1>, grid, block, Stages<1>::kShared,
                    stream, call);
    case 16:
      return launch(quantized_matmul_sm80_kernel<kDType, 2>, grid, block, Stages<2>::kShared,
                    stream, call);
    default:
      return launch(quantized_matmul_sm80_kernel<kDType, 4>, grid, block, Stages<4>::kShared,
                    stream, call);
  }
}

}  // namespace

int cuda::launch_fused_matmul(const FusedMatmulParams& p, void* stream) {
  if (p.tokens == 0 || p.weight.rows == 0) return cudaSuccess;
  if (!fused_matmul_runs(p.weight.cols, p.weight.block_size) || p.splits < 1 || !is_aligned(p.x) ||
      !is_aligned(p.weight.codes))
    return cudaErrorInvalidValue;
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (p.weight.rows > kLargest || p.weight.cols > kLargest || p.tokens > kLargest)
    return cudaErrorInvalidValue;
  // Formats have powers of two; a 64-bit division would be most of the main loop.
  if (p.weight.scales.nested() && power_shift(p.weight.scales.scale_block_size) < 0)
    return cudaErrorInvalidValue;
  const Launch call{p,
                    DeviceScales(p.weight.scales),
                    power_shift(p.weight.block_size),
                    static_cast<int>(p.weight.rows),
                    static_cast<int>(p.weight.cols),
                    static_cast<int>(p.tokens)};
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kBFloat16) return launch_for<DType::kBFloat16>(call, on);
  if (p.dtype == DType::kFloat16) return launch_for<DType::kFloat16>(call, on);
  return cudaErrorInvalidValue;
}

}  // namespace qlk
