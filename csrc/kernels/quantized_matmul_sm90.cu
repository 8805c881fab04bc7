// quantized_matmul for tens to hundreds of tokens on Hopper: y = x Ŵᵀ with wgmma, the weights as
// its left operand, read in their storage layout and decoded to registers, x from shared memory.
//
// As in quantized_matmul_sm80.cu, lane q of a quad takes 16 neighbouring columns of a chunk of 64,
// 8 bytes of a row, a byte becomes a pair of values by a table with a copy for every lane, and the
// chunk's scale multiplies its fp32 sums. wgmma reads its right operand through a descriptor, so x
// is brought into that order of columns by a kernel of its own (arrange_tokens.cuh).
//
// Rows g and g + 8 of a product's 16 rows of a warp are rows 2 g and 2 g + 1 of the weight: the
// swizzle then keeps the lanes' loads of codes out of each other's banks, and neighbouring rows of
// y are one store.
//
// While a warpgroup's products of a chunk are under way, it decodes the next; while it multiplies
// the scales in, those of the other are under way. The sums of a product and of the tile fill its
// registers: that is what limits tiles to 256 rows by 128 tokens.
#include "quantized_matmul_sm90.cuh"

namespace qlk {
namespace {

using cuda::FusedMatmulParams;
using cuda::WgmmaMatmulParams;

// Pair of table values for byte `i` of a word of codes; `lane_offset` is four times the lane.
__device__ __forceinline__ uint32_t look_up(const unsigned char* table, uint32_t lane_offset,
                                            uint32_t word, int i) {
  const uint32_t offset = ptx::permute_bytes(word, lane_offset, 0x5504u | (i << 4));
  return *reinterpret_cast<const uint32_t*>(table + offset);
}

// The left operands of a chunk's four products, for 64 rows: `codes` is where the lane's 8 bytes of
// the even row are.
__device__ __forceinline__ void decode(const unsigned char* table, uint32_t lane_offset,
                                       const unsigned char* stage, uint32_t at,
                                       uint32_t (&left)[4][4]) {
  const uint2 even = *reinterpret_cast<const uint2*>(stage + at);
  // The next row's swizzle differs in the lowest bit.
  const uint2 odd = *reinterpret_cast<const uint2*>(stage + (at ^ 16) + kCodeRowBytes);
  const uint32_t words[2][2] = {{even.x, odd.x}, {even.y, odd.y}};
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      left[step][i] = look_up(table, lane_offset, words[step / 2][i % 2], step % 2 * 2 + i / 2);
}

template <DType kDType, int kTokens, int kUnits>
__device__ __forceinline__ void multiply(const Launch& launch, unsigned char* shared,
                                         const Barriers& barriers, uint32_t* ticket) {
  using Shape = Tile<kTokens, kUnits>;
  constexpr bool kBFloat16 = kDType == DType::kBFloat16;
  constexpr int kColumns = Shape::kColumns, kParts = Shape::kParts, kSums = Shape::kSums;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads,
            group = static_cast<int>(threadIdx.x) / kGroupThreads;
  const int lane = thread % kWarp, g = lane / 4, q = lane % 4;
  const int tile_row = group * kUnits * kUnitRows + thread / kWarp * 16 + 2 * g;
  const uint32_t lane_offset = lane * 4u;
  // Of the even row, in the first chunk; the chunks are 32 bytes apart before the swizzle.
  const auto code_at =
      static_cast<uint32_t>(tile_row * kCodeRowBytes + (q / 2 ^ 2 * g % 8) * 16 + q % 2 * 8);
  // A descriptor counts in 16 bytes.
  const uint64_t x_tiles = ptx::shared_descriptor(shared + Shape::kXAt, Swizzle::k128Bytes);
  constexpr int kStep = 32 / 16, kPart = kColumns * kTokenBytes / 16;

  Position<Shape::kCodeStages> codes;
  Position<Shape::kXStages> x;
  const auto codes_of_stage = [&] {
    return shared + Shape::kCodesAt + codes.stage() * Shape::kCodeBytes;
  };
  const auto release = [&](uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  };
  const auto steps_of_tile = [&](const Walk& walk) {
    return min(walk.left(launch), launch.k_tiles - walk.k_tile(launch));
  };
  for (Walk walk(launch); walk.left(launch) > 0; walk.step += steps_of_tile(walk)) {
    int todo =
        min(launch.chunks - walk.k_tile(launch) * kTileChunks, steps_of_tile(walk) * kTileChunks);
    float sums[kUnits * kParts * kSums] = {};
    float part[kSums];
    uint32_t left[2][4][4];
    ptx::mbarrier_wait(barriers.codes_full + codes.stage(), codes.parity());
    decode(shared, lane_offset, codes_of_stage(), code_at, left[0]);
    for (; todo > 0; todo -= kTileChunks) {
#pragma unroll
      for (int chunk = 0; chunk < kTileChunks; ++chunk) {
        if (chunk >= todo) break;
        ptx::mbarrier_wait(barriers.x_full + x.stage(), x.parity());
        const uint64_t right = x_tiles + x.stage() * (Shape::kXBytes / 16);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          const int now = (chunk * kUnits + unit) % 2;
          const auto* scales = reinterpret_cast<const float*>(shared + Shape::kScalesAt +
                                                              codes.stage() * Shape::kScaleBytes);
          const float2 scale = *reinterpret_cast<const float2*>(scales + chunk * Shape::kRows +
                                                                unit * kUnitRows + tile_row);
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            ptx::wgmma_fence(part);
#pragma unroll
            for (int step = 0; step < 4; ++step)
              ptx::wgmma_rs<kBFloat16, kColumns>(part, left[now][step],
                                                 right + p * kPart + step * kStep, step > 0);
            ptx::wgmma_commit();
            if (p == kParts - 1) {
              if (unit + 1 < kUnits) {
                decode(shared, lane_offset, codes_of_stage(),
                       (code_at ^ chunk * 32) + (unit + 1) * kUnitRows * kCodeRowBytes,
                       left[now ^ 1]);
              } else if (chunk + 1 < kTileChunks) {
                // After the weight's last chunk, zeros that nobody uses.
                decode(shared, lane_offset, codes_of_stage(), code_at ^ (chunk + 1) * 32,
                       left[now ^ 1]);
              } else {
                release(barriers.codes_empty + codes.stage());
                ++codes.count;
                if (todo > kTileChunks) {
                  ptx::mbarrier_wait(barriers.codes_full + codes.stage(), codes.parity());
                  decode(shared, lane_offset, codes_of_stage(), code_at, left[now ^ 1]);
                }
              }
            }
            ptx::wgmma_wait<0>(part);
            if (unit == kUnits - 1 && p == kParts - 1) {
              release(barriers.x_empty + x.stage());
              ++x.count;
            }
            float* to = sums + (unit * kParts + p) * kSums;
#pragma unroll
            for (int i = 0; i < kSums; ++i)
              to[i] = __fmaf_rn(i % 4 < 2 ? scale.x : scale.y, part[i], to[i]);
          }
        }
      }
      if (todo < kTileChunks) {
        release(barriers.codes_empty + codes.stage());
        ++codes.count;
      }
    }

    const FusedMatmulParams& p = launch.p;
    const int tile = walk.tile(launch);
    const bool begins = walk.k_tile(launch) == 0;
    const bool ends = walk.k_tile(launch) + steps_of_tile(walk) == launch.k_tiles;
    const int64_t row = int64_t{tile / launch.token_tiles} * Shape::kRows + tile_row;
    const int64_t token0 = int64_t{tile % launch.token_tiles} * kTokens + 2 * q;
    // The adapter is further columns, whose scale is the scaling.
    for (int64_t rank0 = 0; ends && rank0 < p.rank; rank0 += kChunk) {
      ptx::mbarrier_wait(barriers.x_full + x.stage(), x.parity());
      const uint64_t right = x_tiles + x.stage() * (Shape::kXBytes / 16);
      const auto products =
          static_cast<int>(min(ceil_div(p.rank - rank0, int64_t{16}), int64_t{4}));
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll 1
        for (int step = 0; step < products; ++step) {
          uint32_t b[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            b[i] = load_ranks<kDType>(p, row + unit * kUnitRows + i % 2,
                                      rank0 + step * 16 + i / 2 * 8 + 2 * q);
#pragma unroll
          for (int n = 0; n < kParts; ++n) {
            ptx::wgmma_fence(part);
            ptx::wgmma_rs<kBFloat16, kColumns>(part, b, right + n * kPart + step * kStep, false);
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>(part);
            float* to = sums + (unit * kParts + n) * kSums;
#pragma unroll
            for (int i = 0; i < kSums; ++i) to[i] = __fmaf_rn(p.scaling, part[i], to[i]);
          }
        }
      }
      release(barriers.x_empty + x.stage());
      ++x.count;
    }
    if (!(begins && ends) && !reduce_blocks(launch, tile, sums, ticket)) continue;
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
      store_rows<kDType, kParts * kSums>(p, row + unit * kUnitRows, token0,
                                         sums + unit * kParts * kSums);
  }
}

template <DType kDType, int kTokens, int kUnits>
__global__ __launch_bounds__(kThreads, 1) void quantized_matmul_sm90_kernel(
    const __grid_constant__ Launch launch, const __grid_constant__ TensorMap map) {
  using Shape = Tile<kTokens, kUnits>;
  SHARED_ARRAY(uint64_t, codes_full, [Shape::kCodeStages]);
  SHARED_ARRAY(uint64_t, codes_empty, [Shape::kCodeStages]);
  SHARED_ARRAY(uint64_t, x_full, [Shape::kXStages]);
  SHARED_ARRAY(uint64_t, x_empty, [Shape::kXStages]);
  SHARED_ARRAY(uint32_t, ticket, [kGroups]);
  SWIZZLED_SHARED(unsigned char, shared);
  const Barriers barriers{codes_full, codes_empty, x_full, x_empty};
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  if (thread == kConsumers) {
    for (int i = 0; i < Shape::kCodeStages; ++i) {
      ptx::mbarrier_init(codes_full + i, 2);  // of codes and of scales
      ptx::mbarrier_init(codes_empty + i, kConsumerWarps);
    }
    for (int i = 0; i < Shape::kXStages; ++i) {
      ptx::mbarrier_init(x_full + i, 1);
      ptx::mbarrier_init(x_empty + i, kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  // A lane works out one byte of each 32 and hands it to all lanes. Element 2i is the high nibble
  // of byte i, the lower half of the pair.
  if (thread < kConsumers) {
    const float* codebook = launch.p.weight.codebook;
    const uint32_t own_pair = Element<kDType>::pack(codebook[thread >> 4], codebook[thread & 15]);
    for (int i = 0; i < kWarp; ++i)
      *reinterpret_cast<uint32_t*>(shared + (warp * kWarp + i) * kEntryBytes + lane * 4) =
          __shfl_sync(kAllLanes, own_pair, i);
  }
  __syncthreads();
  if (thread < kConsumers) {
    ptx::register_budget_increase<Shape::kConsumerRegisters>();
    multiply<kDType, kTokens, kUnits>(launch, shared, barriers, ticket);
    return;
  }
  ptx::register_budget_decrease<Shape::kProducerRegisters>();
  if (warp == kConsumerWarps) {
    if (lane == 0) bring_codes<Shape>(launch, map, shared, barriers);
  } else if (warp == kConsumerWarps + 1) {
    if (lane == 0) bring_x<Shape>(launch, shared, barriers);
  } else {
    bring_scales<Shape>(launch, shared, barriers, warp - kConsumerWarps - 2);
  }
}

template <DType kDType, int kTokens, int kUnits>
cudaError_t launch_for(const WgmmaMatmulParams& call, cudaStream_t stream) {
  using Shape = Tile<kTokens, kUnits>;
  const FusedMatmulParams& p = call.operands;
  const int64_t token_tiles = ceil_div(p.tokens, int64_t{kTokens});
  const int64_t k_tiles = ceil_div(p.weight.cols, int64_t{kTileK});
  const int64_t tiles = token_tiles * ceil_div(p.weight.rows, int64_t{Shape::kRows});
  if (tiles * k_tiles >= int64_t{1} << 31 || call.blocks < 1 || call.blocks > tiles * k_tiles)
    return cudaErrorInvalidValue;
  TensorMap map;
  const TensorMapSpec spec{p.weight.codes,    1,
                           p.weight.cols / 2, p.weight.rows,
                           p.weight.cols / 2, kCodeRowBytes,
                           Shape::kRows,      Swizzle::k128Bytes};
  cudaError_t status = make_tensor_map_2d(&map, spec);
  if (status != cudaSuccess) return status;
  const int64_t padded_tokens = token_tiles * kTokens;
  status = arrange_tokens(p, call.arranged, padded_tokens, stream);
  if (status != cudaSuccess) return status;
  const Launch launch{p,
                      DeviceScales(p.weight.scales),
                      static_cast<const unsigned char*>(call.arranged),
                      padded_tokens,
                      power_shift(p.weight.block_size / kChunk),
                      static_cast<int>(p.weight.rows),
                      static_cast<int>(p.weight.cols / kChunk),
                      static_cast<int>(ceil_div(p.rank, int64_t{kChunk})),
                      static_cast<int>(k_tiles),
                      static_cast<int>(token_tiles),
                      static_cast<int>(tiles * k_tiles / call.blocks),
                      static_cast<int>(tiles * k_tiles % call.blocks)};
  return launch_overlapping(quantized_matmul_sm90_kernel<kDType, kTokens, kUnits>,
                            dim3{static_cast<unsigned>(call.blocks), 1, 1}, dim3{kThreads, 1, 1},
                            Shape::kShared, stream, launch, map);
}

template <DType kDType>
cudaError_t launch_for_tile(const WgmmaMatmulParams& call, cudaStream_t stream) {
  const bool tall = call.tile_rows == 256;
  switch (call.tile_tokens) {
    case 32:
      return tall ? launch_for<kDType, 32, 2>(call, stream)
                  : launch_for<kDType, 32, 1>(call, stream);
    case 64:
      return tall ? launch_for<kDType, 64, 2>(call, stream)
                  : launch_for<kDType, 64, 1>(call, stream);
    default:
      return tall ? launch_for<kDType, 128, 2>(call, stream)
                  : launch_for<kDType, 128, 1>(call, stream);
  }
}

}  // namespace

int cuda::launch_wgmma_matmul(const WgmmaMatmulParams& call, void* stream) {
  const FusedMatmulParams& p = call.operands;
  if (p.tokens == 0 || p.weight.rows == 0) return cudaSuccess;
  if (!fused_matmul_runs(p.weight.cols, p.weight.block_size) || !is_aligned(p.x) ||
      !is_aligned(p.weight.codes) || !is_aligned(call.arranged) ||
      !wgmma_matmul_runs(call.tile_rows, call.tile_tokens))
    return cudaErrorInvalidValue;
  if (p.weight.rows > kFusedMostRows || p.weight.cols > kFusedLargest ||
      p.weight.rows * p.weight.cols > kFusedMostElements || p.tokens > kFusedLargest)
    return cudaErrorInvalidValue;
  // A 64-bit division for each scale would take longer than its memory.
  if (p.weight.scales.nested() && power_shift(p.weight.scales.scale_block_size) < 0)
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kBFloat16) return launch_for_tile<DType::kBFloat16>(call, on);
  if (p.dtype == DType::kFloat16) return launch_for_tile<DType::kFloat16>(call, on);
  return cudaErrorInvalidValue;
}

}  // namespace qlk
