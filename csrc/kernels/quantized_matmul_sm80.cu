// quantized_matmul for few tokens: y = x Ŵᵀ with mma.sync, the weights as its left operand, read in
// their storage layout and decoded in registers.
//
// A sum over k may run in any order, so the k that an mma calls 2t, 2t + 1, 2t + 8, 2t + 9 can be
// any four. In a chunk of 64 elements lane t of a quad takes the 16 elements from 16t on, 8 bytes
// of a row; mma m of four takes elements 4m ... 4m + 3 of those, two bytes, and the same four of x.
// A byte is looked up in a table of 256 pairs, one copy per lane, so that no two lanes meet in a
// bank. An entry's copies lie 256 bytes after those of the one before: then a single prmt makes an
// address of a code byte and the lane's. The gaps between them hold the codes. The table holds the
// codebook's values; a chunk has one scale, which multiplies its fp32 sums.
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"
#include "qlk/cuda/ptx_sm90.cuh"
#include "qlk/cuda/scales.cuh"
#include "quantized_matmul_epilogue.cuh"

namespace qlk {
namespace {

using cuda::FusedMatmulParams;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTileN = static_cast<int>(cuda::kFusedTileN);  // 16 rows a warp
constexpr int kTileK = static_cast<int>(cuda::kFusedTileK);
constexpr int kChunk = 64, kChunks = kTileK / kChunk;
constexpr int kCodeRowBytes = kTileK / 2;
// 16 bytes more than the elements: rows then begin 4 banks apart, and eight lanes' 16-byte loads
// meet in none.
constexpr int kXRowBytes = kTileK * 2 + 16;
// Half of each entry's bytes: the table's copies, and two rows of a stage's codes.
constexpr int kEntryBytes = 256, kGap = kWarp * 4, kTableBytes = 256 * kEntryBytes;
constexpr int kGapRows = (kEntryBytes - kGap) / kCodeRowBytes;
constexpr int kCodeStageBytes = kTileN / kGapRows * kEntryBytes;
static_assert(kTileN == kWarps * 16 && kGapRows == 2);

template <int kTokenTiles>
struct Stages {
  // As many as let two blocks share a multiprocessor.
  static constexpr int kCount = kTokenTiles <= 2 ? 4 : 3;
  static constexpr int kXBytes = kTokenTiles * 8 * kXRowBytes;
  static constexpr int kShared = kTableBytes + kCount * kXBytes;
  static_assert(kCount * kCodeStageBytes <= kTableBytes);
};

struct Launch {
  FusedMatmulParams p;
  DeviceScales scales;
  int chunk_shift = 0;  // Chunks of 64 elements in a block of weights: 1 << chunk_shift.
  int rows = 0, cols = 0, tokens = 0;  // 64-bit ones would not fit into the registers.
};

// Where part `part` (16 bytes) of row `row` of a stage's codes lies: neighbouring pairs of rows are
// turned by half a row, so that the 8-byte loads of four rows meet in no bank.
__device__ __forceinline__ int code_offset(int row, int part) {
  return row / kGapRows * kEntryBytes + kGap + row % kGapRows * kCodeRowBytes +
         (part ^ (row & 2)) * 16;
}

// A lane's scale of a tile as it is stored.
struct StoredScale {
  float absmax = 0;
  uint32_t code = 0;
};

// What a thread copies of a tile, and the scale that its lane reads. It stands at a tile and
// reaches the next ones by constants: a round of the main loop moves it on once.
template <int kTokenTiles, bool kNested>
struct Sources {
  static constexpr int kParts = kCodeRowBytes / 16, kRows = kTileN * kParts / kThreads;
  static constexpr int kXParts = kTileK / 8, kTokenStep = kThreads / kXParts;
  static constexpr int kTokens = ceil_div(kTokenTiles * 8, kTokenStep);

  const uint8_t* codes[kRows];
  const uint16_t* x[kTokens];
  int code_bytes[kRows], x_bytes[kTokens];  // 16; 0 for rows and tokens that do not exist
  int code_target, x_target;
  int code_left, x_left;  // elements of K from the thread's first one in the tile on
  uint32_t scale_chunk;
  int scale_left;  // not above 0 for rows that do not exist

  // For columns from k0 on to `end`, a multiple of 64.
  __device__ __forceinline__ Sources(const Launch& launch, int row0, int token0, int k0, int end) {
    const int thread = static_cast<int>(threadIdx.x);
    const int part = thread % kParts, row = thread / kParts;
    // The rows of a thread are a multiple of four apart: the same turn of their parts.
    static_assert(kThreads / kParts % 4 == 0);
    code_target = code_offset(row, part);
    code_left = end - k0 - part * 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int global_row = row0 + row + i * (kThreads / kParts);
      code_bytes[i] = global_row < launch.rows ? 16 : 0;
      codes[i] = launch.p.weight.codes +
                 (int64_t{code_bytes[i] ? global_row : 0} * launch.cols + k0 + part * 32) / 2;
    }
    const int x_part = thread % kXParts, token = thread / kXParts;
    x_target = token * kXRowBytes + x_part * 16;
    x_left = end - k0 - x_part * 8;
    // A thread with one token has no need of x_bytes.
    if (kTokens == 1 && token0 + token >= launch.tokens) x_left = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int global_token = token0 + token + i * kTokenStep;
      x_bytes[i] = global_token < launch.tokens ? 16 : 0;
      x[i] = static_cast<const uint16_t*>(launch.p.x) +
             int64_t{x_bytes[i] ? global_token : 0} * launch.cols + k0 + x_part * 8;
    }
    // Lane t of quad g has chunk t / 2 of row g + 8 (t % 2).
    const int lane = thread % kWarp, chunk = lane % 4 / 2;
    const int scale_row = row0 + thread / kWarp * 16 + lane / 4 + 8 * (lane % 2);
    scale_left = scale_row < launch.rows ? end - k0 - chunk * kChunk : 0;
    scale_chunk = static_cast<uint32_t>(scale_row) * static_cast<uint32_t>(launch.cols / kChunk) +
                  k0 / kChunk + chunk;
  }

  // Copies the tile `step` tiles on to a stage of codes and one of x: zeros where there is nothing.
  // Of a copy that reads no byte the address does not matter.
  __device__ __forceinline__ void copy(int step, unsigned char* code_stage,
                                       unsigned char* x_stage) const {
    static_assert(kCodeRowBytes * (kThreads / kParts) == kCodeStageBytes / 2 / kRows);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      ptx::copy_async<16>(code_stage + code_target + i * (kCodeStageBytes / kRows),
                          codes[i] + step * kCodeRowBytes,
                          code_left > step * kTileK ? code_bytes[i] : 0);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (kTokenTiles * 8 % kTokenStep == 0 ||
          static_cast<int>(threadIdx.x) < kTokenTiles * 8 * kXParts)
        ptx::copy_async<16>(x_stage + x_target + i * kTokenStep * kXRowBytes, x[i] + step * kTileK,
                            x_left <= step * kTileK ? 0
                            : kTokens == 1          ? 16
                                                    : x_bytes[i]);
    }
  }

  // The lane's scale of the tile `step` tiles on.
  __device__ __forceinline__ StoredScale load_scale(const Launch& launch, int step) const {
    StoredScale scale;
    if (scale_left > step * kTileK) {
      const uint32_t block = (scale_chunk + step * (kTileK / kChunk)) >> launch.chunk_shift;
      if constexpr (kNested) {
        scale.code = launch.scales.view.scale_codes[block];
        scale.absmax = launch.scales.view.scale_absmax[block >> launch.scales.group_shift];
      } else {
        scale.absmax = launch.scales.view.absmax[block];
      }
    }
    return scale;
  }

  __device__ __forceinline__ void advance(int tiles) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) codes[i] += tiles * kCodeRowBytes;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) x[i] += tiles * kTileK;
    code_left -= tiles * kTileK;
    x_left -= tiles * kTileK;
    scale_left -= tiles * kTileK;
    scale_chunk += tiles * (kTileK / kChunk);
  }
};

// Pair of table values for byte `i` of a word of codes; `lane_offset` is four times the lane.
__device__ __forceinline__ uint32_t look_up(const unsigned char* table, uint32_t lane_offset,
                                            uint32_t word, int i) {
  const uint32_t offset = ptx::permute_bytes(word, lane_offset, 0x5504u | (i << 4));
  return *reinterpret_cast<const uint32_t*>(table + offset);
}

template <bool kBFloat16, int kTokenTiles>
__device__ __forceinline__ void multiply_tile(const unsigned char* code_stage,
                                              const unsigned char* x_stage,
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
      const uint2 words = *reinterpret_cast<const uint2*>(code_stage + at);
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
        for (int i = 0; i < 4; ++i)
          left[m][i] = look_up(table, lane * 4u, codes[i % 2][pair], 2 * m + i / 2);
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const unsigned char* row = x_stage + (tile * 8 + g) * kXRowBytes;
        const uint4 x =
            *reinterpret_cast<const uint4*>(row + chunk * kChunk * 2 + t * 32 + pair * 16);
        const uint32_t first[2] = {x.x, x.y}, second[2] = {x.z, x.w};
        ptx::multiply_add<kBFloat16>(part[tile], left[0], first);
        ptx::multiply_add<kBFloat16>(part[tile], left[1], second);
      }
    }
    // From within the quad: lanes by constants.
    const float scale_g = __shfl_sync(kAllLanes, scale, 2 * chunk, 4);
    const float scale_g8 = __shfl_sync(kAllLanes, scale, 2 * chunk + 1, 4);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[tile][i] = __fmaf_rn(i < 2 ? scale_g : scale_g8, part[tile][i], sums[tile][i]);
  }
}

// Grid: groups of tokens, row tiles, splits of K. Blocks that read the same weights follow each
// other: all but the first find them in L2.
template <DType kDType, int kTokenTiles, bool kNested>
__global__ __launch_bounds__(kThreads, 2) void quantized_matmul_sm80_kernel(
    const __grid_constant__ Launch launch) {
  constexpr bool kBFloat16 = kDType == DType::kBFloat16;
  constexpr int kStages = Stages<kTokenTiles>::kCount, kXBytes = Stages<kTokenTiles>::kXBytes;
  SHARED_ARRAY(float, scale_map, [kScaleCodes]);
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const x_stages = shared + kTableBytes;
  const FusedMatmulParams& p = launch.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row0 = static_cast<int>(blockIdx.y) * kTileN;
  const int token0 = static_cast<int>(blockIdx.x) * kTokenTiles * 8;
  const int warp_row = row0 + warp * 16;
  const int64_t n_tiles = ceil_div(launch.cols, kTileK);
  const auto first = static_cast<int>(n_tiles * blockIdx.z / p.splits);
  const auto last = static_cast<int>(n_tiles * (blockIdx.z + 1) / p.splits);

  Sources<kTokenTiles, kNested> sources(launch, row0, token0, first * kTileK,
                                        min(launch.cols, last * kTileK));
  StoredScale scales[kStages];
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    sources.copy(s, shared + s * kCodeStageBytes, x_stages + s * kXBytes);
    scales[s] = sources.load_scale(launch, s);
    ptx::commit_copies();
  }

  // Meanwhile the tables. A lane works out one byte of each 32 and hands it to all lanes.
  float offset = 0;
  if constexpr (kNested) {
    scale_map[threadIdx.x] = launch.scales.view.scale_codebook[threadIdx.x];
    offset = *launch.scales.view.scale_offset;
  }
  // Element 2i is the high nibble of byte i, the lower half of the pair.
  const uint32_t own_pair = Element<kDType>::pack(p.weight.codebook[threadIdx.x >> 4],
                                                  p.weight.codebook[threadIdx.x & 15]);
  for (int i = 0; i < kWarp; ++i)
    *reinterpret_cast<uint32_t*>(shared + (warp * kWarp + i) * kEntryBytes + lane * 4) =
        __shfl_sync(kAllLanes, own_pair, i);

  float sums[kTokenTiles][4] = {};
  for (int tile = first; tile < last; tile += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (tile + s < last) {
        ptx::wait_copies<kStages - 2>();
        // The tile is there for all, and all are done with the one that is overwritten next.
        __syncthreads();
        const int next = (s + kStages - 1) % kStages;
        sources.copy(s + kStages - 1, shared + next * kCodeStageBytes, x_stages + next * kXBytes);
        scales[next] = sources.load_scale(launch, s + kStages - 1);
        ptx::commit_copies();
        float scale = scales[s].absmax;
        if constexpr (kNested)
          scale = __fadd_rn(__fmul_rn(scale_map[scales[s].code], scale), offset);
        multiply_tile<kBFloat16, kTokenTiles>(shared + s * kCodeStageBytes, x_stages + s * kXBytes,
                                              shared, scale, sums);
      }
    }
    sources.advance(kStages);
  }
  ptx::wait_copies<0>();

  // Up to here nothing was read that the down-projection writes, and nothing written at all: this
  // kernel may have started before that one ended (launch_projected_matmul), and its partial sums
  // and tickets may be those of a product further back in the stream.
  ptx::wait_for_primary();
  if (p.splits > 1) {
    const auto tile_index = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
    if (!reduce_splits<kThreads, kTokenTiles>(p, tile_index, sums)) return;
  }
  if (p.rank > 0) add_adapter<kDType, kTokenTiles>(p, warp_row, token0, sums);
  store_tile<kDType, kTokenTiles>(p, warp_row, token0, sums);
}

template <DType kDType, int kTokenTiles>
cudaError_t launch_for(const Launch& call, cudaStream_t stream) {
  const FusedMatmulParams& p = call.p;
  const dim3 grid{static_cast<unsigned>(ceil_div(p.tokens, int64_t{kTokenTiles} * 8)),
                  static_cast<unsigned>(ceil_div(p.weight.rows, int64_t{kTileN})),
                  static_cast<unsigned>(p.splits)};
  const dim3 block{kThreads, 1, 1};
  constexpr int kShared = Stages<kTokenTiles>::kShared;
  const auto kernel = p.weight.scales.nested()
                          ? quantized_matmul_sm80_kernel<kDType, kTokenTiles, true>
                          : quantized_matmul_sm80_kernel<kDType, kTokenTiles, false>;
  if (p.overlaps) return launch_overlapping(kernel, grid, block, kShared, stream, call);
  return launch(kernel, grid, block, kShared, stream, call);
}

template <DType kDType>
cudaError_t launch_for_tokens(const Launch& call, cudaStream_t stream) {
  switch (cuda::fused_matmul_tokens(call.p.tokens)) {
    case 8:
      return launch_for<kDType, 1>(call, stream);
    case 16:
      return launch_for<kDType, 2>(call, stream);
    default:
      return launch_for<kDType, 4>(call, stream);
  }
}

}  // namespace

int cuda::launch_fused_matmul(const FusedMatmulParams& p, void* stream) {
  if (p.tokens == 0 || p.weight.rows == 0) return cudaSuccess;
  if (!fused_matmul_runs(p.weight.cols, p.weight.block_size) || p.splits < 1 || !is_aligned(p.x) ||
      !is_aligned(p.weight.codes))
    return cudaErrorInvalidValue;
  if (p.weight.rows > kFusedMostRows || p.weight.cols > kFusedLargest ||
      p.weight.rows * p.weight.cols > kFusedMostElements || p.tokens > kFusedLargest ||
      p.splits > 65535)
    return cudaErrorInvalidValue;
  // A 64-bit division would be most of the main loop.
  if (p.weight.scales.nested() && power_shift(p.weight.scales.scale_block_size) < 0)
    return cudaErrorInvalidValue;
  const Launch call{p,
                    DeviceScales(p.weight.scales),
                    power_shift(p.weight.block_size / kChunk),
                    static_cast<int>(p.weight.rows),
                    static_cast<int>(p.weight.cols),
                    static_cast<int>(p.tokens)};
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kBFloat16) return launch_for_tokens<DType::kBFloat16>(call, on);
  if (p.dtype == DType::kFloat16) return launch_for_tokens<DType::kFloat16>(call, on);
  return cudaErrorInvalidValue;
}

}  // namespace qlk
