// The parts of quantized_matmul_sm90.cu around its products: tiles and how blocks share their work
// out, the threads that bring operands to shared memory, sums of shared tiles, and y.
#pragma once

#include "arrange_tokens.cuh"
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/ptx_wgmma.cuh"
#include "qlk/cuda/scales.cuh"

namespace qlk {

// Two warpgroups multiply, the warps of a third bring what they need.
constexpr int kGroups = 2, kGroupThreads = 128, kConsumers = kGroups * kGroupThreads;
constexpr int kThreads = kConsumers + kGroupThreads, kConsumerWarps = kConsumers / kWarp;
// Columns that share a scale, and as bytes of a token; columns of a stage of codes, whose rows then
// are as wide as a swizzle.
constexpr int kChunk = 64, kTokenBytes = kChunk * 2;
constexpr int kTileK = static_cast<int>(cuda::kWgmmaTileK), kTileChunks = kTileK / kChunk;
constexpr int kCodeRowBytes = kTileK / 2;
constexpr int kUnitRows = 64;  // of one product
constexpr int kEntryBytes = 256, kTableBytes = 256 * kEntryBytes;
// 227 KiB are a block's; one is left for barriers, and for the boundary of what comes after them.
constexpr int kMostShared = 226 << 10;
static_assert(kCodeRowBytes == static_cast<int>(Swizzle::k128Bytes));
static_assert(kTokenBytes == static_cast<int>(Swizzle::k128Bytes));

// kUnits: how often a warpgroup has 64 rows of the tile.
template <int kTokens, int kUnits>
struct Tile {
  static constexpr int kRows = kGroups * kUnits * kUnitRows;
  // Tokens of a product: all, unless the registers could not hold their sums besides.
  static constexpr int kColumns = kTokens * kUnits > 128 ? 64 : kTokens;
  static constexpr int kParts = kTokens / kColumns, kSums = kColumns / 2;
  static constexpr int kCodeBytes = kRows * kCodeRowBytes;
  static constexpr int kScaleBytes = kRows * kTileChunks * static_cast<int>(sizeof(float));
  // At least 32 KiB under way: what an H200 brings in the time that memory takes to answer.
  static constexpr int kCodeStages = kUnits == 1 ? 4 : 2;
  static constexpr int kXBytes = kTokens * kTokenBytes;
  // 504 of the 512 that three warpgroups of 168 have between them.
  static constexpr bool kFull = kTokens * kUnits > 128;
  static constexpr int kConsumerRegisters = kFull ? 232 : 224;
  static constexpr int kProducerRegisters = kFull ? 40 : 56;
  // Loads under way of a lane that brings scales: as many as it has registers for.
  static constexpr int kScaleBatch = kFull ? 4 : 8;
  static constexpr int kCodesAt = kTableBytes, kXAt = kCodesAt + kCodeStages * kCodeBytes;
  static constexpr int kFit = (kMostShared - kXAt - kCodeStages * kScaleBytes) / kXBytes;
  static constexpr int kXStages = kFit < 8 ? 4 : 8;
  static constexpr int kScalesAt = kXAt + kXStages * kXBytes;
  static constexpr int kShared = kScalesAt + kCodeStages * kScaleBytes;
  static_assert(kFit >= 4 && kXBytes % 1024 == 0 && kCodeBytes % 1024 == 0);
};

struct Launch {
  cuda::FusedMatmulParams p;
  DeviceScales scales;
  const unsigned char* arranged = nullptr;
  int64_t padded_tokens = 0;
  int chunk_shift = 0;  // Chunks in a block of weights: 1 << chunk_shift.
  int rows = 0, chunks = 0, adapter_chunks = 0;
  // A tile is k_tiles steps of work, and token_tiles tiles in a row have the same rows.
  int k_tiles = 0, token_tiles = 0, steps_per_block = 0, longer_blocks = 0;
};

// Steps of all tiles, numbered tile by tile, are shared out in their order: a block has
// steps_per_block, the first blocks one more.
__device__ __forceinline__ int first_step(const Launch& launch, int block) {
  return launch.steps_per_block * block + min(block, launch.longer_blocks);
}
// The block that a step belongs to.
__device__ __forceinline__ int block_of(const Launch& launch, int step) {
  const int in_longer = launch.longer_blocks * (launch.steps_per_block + 1);
  if (step < in_longer) return step / (launch.steps_per_block + 1);
  return launch.longer_blocks + (step - in_longer) / launch.steps_per_block;
}

// A block's steps, one after another. Little state: the registers of those who multiply are full.
struct Walk {
  int step;

  __device__ __forceinline__ explicit Walk(const Launch& launch)
      : step(first_step(launch, static_cast<int>(blockIdx.x))) {}

  __device__ __forceinline__ int left(const Launch& launch) const {
    return first_step(launch, static_cast<int>(blockIdx.x) + 1) - step;
  }
  __device__ __forceinline__ int tile(const Launch& launch) const { return step / launch.k_tiles; }
  __device__ __forceinline__ int k_tile(const Launch& launch) const {
    return step % launch.k_tiles;
  }
};

// Which stage of a ring is next, and the parity of the phase that its barriers are in.
template <int kStages>
struct Position {
  uint32_t count = 0;

  __device__ __forceinline__ uint32_t stage() const { return count % kStages; }
  __device__ __forceinline__ uint32_t parity() const { return count / kStages % 2; }
  static_assert((kStages & (kStages - 1)) == 0);
};

// Barriers of the stages of codes with their scales, and of x.
struct Barriers {
  uint64_t *codes_full, *codes_empty, *x_full, *x_empty;
};

// One thread. A stage's codes are of the tile's rows, 128 bytes each, zeros outside the weight.
template <class Shape>
__device__ __forceinline__ void bring_codes(const Launch& launch, const TensorMap& map,
                                            unsigned char* shared, const Barriers& barriers) {
  Position<Shape::kCodeStages> at;
  for (Walk walk(launch); walk.left(launch) > 0; ++walk.step) {
    ptx::mbarrier_wait(barriers.codes_empty + at.stage(), at.parity() ^ 1);
    ptx::mbarrier_arrive_expect_bytes(barriers.codes_full + at.stage(), Shape::kCodeBytes);
    ptx::copy_tensor_2d(shared + Shape::kCodesAt + at.stage() * Shape::kCodeBytes, &map,
                        walk.k_tile(launch) * kCodeRowBytes,
                        walk.tile(launch) / launch.token_tiles * Shape::kRows,
                        barriers.codes_full + at.stage());
    ++at.count;
  }
}

// One thread. The chunks of xa follow those of x, for the block that ends the tile.
template <class Shape>
__device__ __forceinline__ void bring_x(const Launch& launch, unsigned char* shared,
                                        const Barriers& barriers) {
  Position<Shape::kXStages> at;
  ptx::wait_for_primary();
  for (Walk walk(launch); walk.left(launch) > 0; ++walk.step) {
    constexpr int kTokens = Shape::kXBytes / kTokenBytes;
    const int64_t token0 = int64_t{walk.tile(launch) % launch.token_tiles} * kTokens;
    const int first = walk.k_tile(launch) * kTileChunks;
    const int last = walk.k_tile(launch) + 1 < launch.k_tiles
                         ? first + kTileChunks
                         : launch.chunks + launch.adapter_chunks;
    for (int chunk = first; chunk < last; ++chunk) {
      ptx::mbarrier_wait(barriers.x_empty + at.stage(), at.parity() ^ 1);
      ptx::mbarrier_arrive_expect_bytes(barriers.x_full + at.stage(), Shape::kXBytes);
      ptx::copy_bulk(shared + Shape::kXAt + at.stage() * Shape::kXBytes,
                     launch.arranged + (chunk * launch.padded_tokens + token0) * kTokenBytes,
                     Shape::kXBytes, barriers.x_full + at.stage());
      ++at.count;
    }
  }
}

// Two warps, each every other stage: what memory takes to answer is longer than a stage may last.
// A stage's scales are [chunk][row], decoded; zeros where there are none.
template <class Shape>
__device__ __forceinline__ void bring_scales(const Launch& launch, unsigned char* shared,
                                             const Barriers& barriers, int warp) {
  constexpr int kRowStep = kWarp / kTileChunks, kBatch = Shape::kScaleBatch;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int lane_chunk = lane % kTileChunks, lane_row = lane / kTileChunks;
  const float* map = launch.scales.view.scale_codebook;
  const float offset = launch.scales.nested() ? *launch.scales.view.scale_offset : 0.0f;
  Position<Shape::kCodeStages> at;
  int mine = warp;
  for (Walk walk(launch); walk.left(launch) > 0; ++walk.step) {
    if (mine == 0) {
      const int chunk = walk.k_tile(launch) * kTileChunks + lane_chunk;
      const int row0 = walk.tile(launch) / launch.token_tiles * Shape::kRows + lane_row;
      float* scales =
          reinterpret_cast<float*>(shared + Shape::kScalesAt + at.stage() * Shape::kScaleBytes) +
          lane_chunk * Shape::kRows + lane_row;
#pragma unroll 1
      for (int first = 0; first < Shape::kRows; first += kBatch * kRowStep) {
        float values[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int row = row0 + first + i * kRowStep;
          const uint32_t block =
              (static_cast<uint32_t>(row) * static_cast<uint32_t>(launch.chunks) +
               static_cast<uint32_t>(chunk)) >>
              launch.chunk_shift;
          values[i] = row < launch.rows && chunk < launch.chunks
                          ? launch.scales.decode(block, map, offset)
                          : 0.0f;
        }
        if (first == 0) ptx::mbarrier_wait(barriers.codes_empty + at.stage(), at.parity() ^ 1);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) scales[first + i * kRowStep] = values[i];
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(barriers.codes_full + at.stage());
    }
    mine ^= 1;
    ++at.count;
  }
}

// Two neighbouring ranks of a row of lora_b, rounded to the operands' dtype; zeros outside.
template <DType kDType>
__device__ __forceinline__ uint32_t load_ranks(const cuda::FusedMatmulParams& p, int64_t row,
                                               int64_t rank) {
  const bool inside = row < p.weight.rows;
  const auto value = [&](int64_t r) {
    return inside && r < p.rank ? load_any(p.lora_b, p.lora_b_dtype, row * p.rank + r) : 0.0f;
  };
  return Element<kDType>::pack(value(rank), value(rank + 1));
}

// Sums of a tile that blocks share: each leaves its own behind; the last of a warpgroup's to do so
// adds up all of them, in the order of the blocks, and returns true. Of a block's two places in the
// partial sums the second is for the tile that it begins.
template <int kCount>
__device__ __forceinline__ bool reduce_blocks(const Launch& launch, int tile, float (&sums)[kCount],
                                              uint32_t* ticket) {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads,
            group = static_cast<int>(threadIdx.x) / kGroupThreads;
  const int first = block_of(launch, tile * launch.k_tiles),
            last = block_of(launch, (tile + 1) * launch.k_tiles - 1);
  constexpr int64_t kPlace = int64_t{kGroups} * kGroupThreads * kCount;
  float* base = launch.p.partials + (int64_t{group} * kGroupThreads * kCount) + 4 * thread;
  const auto place = [&](int block) { return base + (2 * block + (block == first)) * kPlace; };
  float* mine = place(static_cast<int>(blockIdx.x));
#pragma unroll
  for (int i = 0; i < kCount; i += 4)
    ptx::store_global(reinterpret_cast<uint4*>(mine + i * kGroupThreads),
                      make_uint4(__float_as_uint(sums[i]), __float_as_uint(sums[i + 1]),
                                 __float_as_uint(sums[i + 2]), __float_as_uint(sums[i + 3])));
  __threadfence();
  ptx::named_barrier_sync(1 + group, kGroupThreads);
  uint32_t* tickets = launch.p.tickets + int64_t{tile} * kGroups + group;
  if (thread == 0) ticket[group] = atomicAdd(tickets, 1u);
  ptx::named_barrier_sync(1 + group, kGroupThreads);
  const bool is_last = ticket[group] == static_cast<uint32_t>(last - first);
  // The next tile's ticket goes to the same place.
  ptx::named_barrier_sync(1 + group, kGroupThreads);
  if (!is_last) return false;
  __threadfence();
  if (thread == 0) *tickets = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
  for (int block = first; block <= last; ++block) {
    const float* theirs = place(block);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const uint4 v = ptx::load_from_l2(reinterpret_cast<const uint4*>(theirs + i * kGroupThreads));
      sums[i] = __fadd_rn(sums[i], __uint_as_float(v.x));
      sums[i + 1] = __fadd_rn(sums[i + 1], __uint_as_float(v.y));
      sums[i + 2] = __fadd_rn(sums[i + 2], __uint_as_float(v.z));
      sums[i + 3] = __fadd_rn(sums[i + 3], __uint_as_float(v.w));
    }
  }
  return true;
}

// y of a thread's rows `row` and the next, `row` being even, and of its tokens: of sums[i] token
// token0 + 8 (i / 4) + i % 2, row + i / 2 % 2.
template <DType kDType, int kCount>
__device__ __forceinline__ void store_rows(const cuda::FusedMatmulParams& p, int64_t row,
                                           int64_t token0, const float* sums) {
  if (row >= p.weight.rows) return;
  const bool both = row + 1 < p.weight.rows, aligned = p.weight.rows % 2 == 0;
  // Without a bias nothing is added: -0 stays.
  const float bias[2] = {p.bias ? load_any(p.bias, p.bias_dtype, row) : 0.0f,
                         p.bias && both ? load_any(p.bias, p.bias_dtype, row + 1) : 0.0f};
  auto* y = static_cast<uint16_t*>(p.y) + token0 * p.weight.rows + row;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (token0 + 2 * i + e >= p.tokens) continue;
      float low = sums[i + e], high = sums[i + 2 + e];
      if (p.bias) low = __fadd_rn(low, bias[0]), high = __fadd_rn(high, bias[1]);
      const uint32_t pair = Element<kDType>::pack(low, high);
      uint16_t* to = y + e * p.weight.rows;
      if (aligned) {
        *reinterpret_cast<uint32_t*>(to) = pair;
      } else {
        to[0] = static_cast<uint16_t>(pair);
        if (both) to[1] = static_cast<uint16_t>(pair >> 16);
      }
    }
    y += 8 * p.weight.rows;
  }
}

}  // namespace qlk
