// y = x Ŵᵀ on AMX tiles for any number of tokens. Decoded weights are the A operand (16 output
// features by 32 of K), x packed in pairs is B, so a result tile is yᵀ [16 features x 16 tokens].
// A unit of work is 32 features: a chunk of their weights is decoded into the first-level cache and
// multiplied with every token of a block whose packed x stays in the second-level cache.
#include <algorithm>
#include <bit>
#include <cstring>

#include "qlk/amx.h"
#include "qlk/convert.h"
#include "qlk/decode_tiles.h"
#include "qlk/isa.h"
#include "qlk/low_rank.h"
#include "qlk/quantized_matmul.h"
#include "qlk/scratch.h"

namespace qlk {

#if defined(QLK_X86)

namespace {

using namespace amx;

constexpr int64_t kTokenBlock = 256;
// Packed x of a block of tokens and of K: half of a 2 MiB second-level cache.
constexpr int64_t kPackedBytes = 1 << 20;
// Output features whose sums wait while K is worked through in blocks: bounds that buffer to 4 MiB.
constexpr int64_t kWaitingRows = 4096;
// Decoded weights held at a time: 16 KiB, or 16 KiB twice where decoding runs ahead.
constexpr int64_t kChunk = 256, kChunkRows = 32;
constexpr int64_t kAheadChunk = 128, kAheadBytes = 16 << 10;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One block of tokens against one block of K for a range of output features.
struct Block : ColumnBlock {
  const QuantizedMatmulParams* params;
  int64_t token_begin, tokens, token_tiles;
  int64_t k_count, k_tiles;
  int64_t row_begin, row_end;
  int64_t unit_rows;  // 64 for one tile of tokens, else 32: four sums hide the latency
  int64_t rank_tiles;
  const char* packed;       // B tiles [token_tiles][k_tiles]
  const char* packed_left;  // B tiles [token_tiles][rank_tiles] of the low-rank term
  float* waiting;           // C tiles [units][token_tiles][unit tiles], null if K is one block

  int64_t unit_tiles() const { return unit_rows / kTileRows; }
  bool decodes_ahead() const { return token_tiles <= 2; }
};

struct UnitScratch {
  char* weights;    // A rows of decoded weights
  char* right;      // A tiles [rank_tiles][unit tiles]
  float* sums;      // C tiles [token_tiles][unit tiles]
  float* low_rank;  // C tiles [unit tiles]
  float* scales;    // [unit_rows][unit_scales]
};

QLK_AMX void pack_x(const Block& block, char* packed, int64_t tile_begin, int64_t tile_end) {
  const auto* x = static_cast<const uint16_t*>(block.params->x);
  const int64_t K = block.params->weight.cols;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t token = tile / block.k_tiles * kTileRows, k = tile % block.k_tiles * kTileDepth;
    pack_pairs<true>(x + (block.token_begin + token) * K + block.k_begin + k, K,
                     block.tokens - token, block.k_count - k, packed + tile * kTileBytes);
  }
}

QLK_AMX void pack_left(const Block& block, char* packed) {
  const LowRankTerm& term = block.params->low_rank;
  alignas(64) uint16_t rows[kTileRows * kTileDepth];
  for (int64_t m = 0; m < block.token_tiles; ++m) {
    const int64_t tokens = std::min(kTileRows, block.tokens - m * kTileRows);
    for (int64_t s = 0; s < block.rank_tiles; ++s, packed += kTileBytes) {
      const int64_t ranks = std::min(kTileDepth, term.rank - s * kTileDepth);
      const float* left = term.left + (block.token_begin + m * kTileRows) * padded_rank(term.rank);
      for (int64_t i = 0; i < tokens; ++i)
        store_f32(left + i * padded_rank(term.rank) + s * kTileDepth, ranks, DType::kBFloat16,
                  Isa::kAmx, rows + i * kTileDepth);
      pack_pairs<false>(rows, kTileDepth, tokens, ranks, packed);
    }
  }
}

// Rows of the A tiles are output features, columns ranks.
void pack_right(const Block& block, int64_t row, int64_t rows, char* packed) {
  const LowRankTerm& term = block.params->low_rank;
  const int64_t step = block.unit_tiles() * kTileBytes;
  std::memset(packed, 0, static_cast<size_t>(block.rank_tiles * step));
  float run[kTileDepth];
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t s = 0; s < block.rank_tiles; ++s) {
      const int64_t ranks = std::min(kTileDepth, term.rank - s * kTileDepth);
      load_f32(term.right, term.right_dtype, (row + i) * term.right_col_stride + s * kTileDepth,
               ranks, Isa::kAmx, run);
      store_f32(run, ranks, DType::kBFloat16, Isa::kAmx, packed + s * step + i * kRowBytes);
    }
  }
}

// Result tiles of a unit's features by 16 tokens to rows of y.
QLK_AMX void store_tokens(const Block& block, int64_t row, int64_t rows, int64_t token,
                          const float* sums, const float* low_rank, const float* bias) {
  const QuantizedMatmulParams& p = *block.params;
  const int64_t N = p.weight.rows;
  auto* y = static_cast<uint16_t*>(p.y) + (block.token_begin + token) * N + row;
  const int64_t tokens = std::min(kTileRows, block.tokens - token);
  const __m512 scaling = _mm512_set1_ps(p.low_rank.scaling);
  for (int64_t first = 0; first < rows; first += kTileRows) {
    __m512i values[kTileRows];
    QLK_UNROLL
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t at = (first + i) * kTileRows;
      __m512 value = _mm512_load_ps(sums + at);
      if (low_rank)
        value = _mm512_add_ps(value, _mm512_mul_ps(scaling, _mm512_load_ps(low_rank + at)));
      if (bias) value = _mm512_add_ps(value, _mm512_set1_ps(bias[first + i]));
      values[i] = _mm512_castps_si512(value);
    }
    transpose(values);
    const __mmask16 mask = _cvtu32_mask16(first_lanes(std::min(kTileRows, rows - first)));
    for (int64_t m = 0; m < tokens; ++m)
      _mm256_mask_storeu_epi16(
          y + m * N + first, mask,
          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_castsi512_ps(values[m]))));
  }
}

QLK_AMX void finish_unit(const Block& block, int64_t row, int64_t rows, const float* sums,
                         const UnitScratch& scratch) {
  const QuantizedMatmulParams& p = *block.params;
  const bool low_rank = p.low_rank.present();
  float bias[4 * kTileRows] = {};
  if (p.bias) load_f32(p.bias, p.bias_dtype, row, rows, Isa::kAmx, bias);
  if (low_rank) pack_right(block, row, rows, scratch.right);
  const int64_t step = block.unit_tiles() * kTileBytes;
  for (int64_t m = 0; m < block.token_tiles; ++m) {
    for (int64_t i = 0; low_rank && i < block.unit_tiles(); i += 2) {
      const char* right = scratch.right + i * kTileBytes;
      const TileRun a[2] = {{right, step, kRowBytes}, {right + kTileBytes, step, kRowBytes}};
      const TileRun b[1] = {
          {block.packed_left + m * block.rank_tiles * kTileBytes, kTileBytes, kRowBytes}};
      float* const c[2] = {scratch.low_rank + i * kTileFloats,
                           scratch.low_rank + (i + 1) * kTileFloats};
      multiply_steps<2, 1>(a, b, block.rank_tiles, false, c);
    }
    store_tokens(block, row, rows, m * kTileRows, sums + m * block.unit_tiles() * kTileFloats,
                 low_rank ? scratch.low_rank : nullptr, p.bias ? bias : nullptr);
  }
}

QLK_AMX void decode_unit_scales(const Block& block, int64_t row, int64_t rows, float* scales) {
  const QuantizedView& weight = block.params->weight;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t flat = (row + i) * weight.cols + block.k_begin;
    const int64_t first = flat >> block.block_shift;
    const int64_t count = ((flat + block.k_count - 1) >> block.block_shift) - first + 1;
    decode_scales_avx512(weight.scales, first, count, scales + i * block.row_scales);
  }
}

// How far ahead of a chunk's codes the next ones are: in the same row, or in the row that takes its
// place in the next unit.
int64_t prefetch_distance(const Block& block, int64_t k, int64_t chunk) {
  const int64_t cols = block.params->weight.cols;
  return (k + chunk < block.k_count ? chunk : block.unit_rows * cols - k) / 2;
}

// Sums of a unit over the block of K for many tokens: each chunk of weights is used by all of them.
QLK_AMX void multiply_unit(const Block& block, int64_t row, float* sums,
                           const UnitScratch& scratch) {
  const int64_t b_step = block.k_tiles * kTileBytes;
  for (int64_t k = 0; k < block.k_count; k += kChunk) {
    const int64_t count = std::min(kChunk, block.k_count - k);
    const int64_t steps = round_up(count, kTileDepth) / kTileDepth;
    ChunkDecoder<kChunk>(block, row, k, count, prefetch_distance(block, k, kChunk), scratch.scales,
                         scratch.weights)
        .next(kChunkRows);
    const TileRun a[2] = {{scratch.weights, kRowBytes, kChunk * 2},
                          {scratch.weights + kTileRows * kChunk * 2, kRowBytes, kChunk * 2}};
    const bool accumulate = block.k_begin + k > 0;
    const char* packed = block.packed + k / kTileDepth * kTileBytes;
    float* tile = sums;
    int64_t m = 0;
    for (; m + 2 <= block.token_tiles; m += 2, tile += 4 * kTileFloats) {
      const TileRun b[2] = {{packed + m * b_step, kTileBytes, kRowBytes},
                            {packed + (m + 1) * b_step, kTileBytes, kRowBytes}};
      float* const c[4] = {tile, tile + 2 * kTileFloats, tile + kTileFloats,
                           tile + 3 * kTileFloats};
      multiply_steps<2, 2>(a, b, steps, accumulate, c);
    }
    if (m < block.token_tiles) {
      const TileRun b[1] = {{packed + m * b_step, kTileBytes, kRowBytes}};
      float* const c[2] = {tile, tile + kTileFloats};
      multiply_steps<2, 1>(a, b, steps, accumulate, c);
    }
  }
}

// The same for one tile of tokens (kA = 4) or two (kA = 2): the sums stay in tile registers, and a
// chunk is decoded between the multiplications of the one before, which run on their own unit.
template <int kA, int kB>
QLK_AMX void multiply_unit_ahead(const Block& block, int64_t row, float* sums,
                                 const UnitScratch& scratch) {
  constexpr int64_t kSteps = kAheadChunk / kTileDepth, kRows = kA * kTileRows;
  constexpr int64_t kRowsPerQuarter = kRows / kSteps / 4;
  float* c[4] = {};
  for (int i = 0; i < kA; ++i)
    for (int j = 0; j < kB; ++j) c[i * kB + j] = sums + (j * kA + i) * kTileFloats;
  if (block.k_begin > 0)
    load_sums<kA * kB>(c);
  else
    zero_sums<kA * kB>();
  // Chunk k is multiplied while chunk k + kAheadChunk is decoded.
  for (int64_t k = -kAheadChunk; k < block.k_count; k += kAheadChunk) {
    const int64_t next = k + kAheadChunk, next_count = std::min(kAheadChunk, block.k_count - next);
    const int64_t count = k < 0 ? 0 : std::min(kAheadChunk, block.k_count - k);
    const int64_t parity = next / kAheadChunk % 2;
    char* ahead = scratch.weights + parity * kAheadBytes;
    const char* ready = scratch.weights + (1 - parity) * kAheadBytes;
    ChunkDecoder<kAheadChunk> decoder(block, row, next, next_count,
                                      prefetch_distance(block, next, kAheadChunk), scratch.scales,
                                      ahead);
    TileRun a[kA], b[kB];
    for (int i = 0; i < kA; ++i)
      a[i] = {ready + i * kTileRows * kAheadChunk * 2, kRowBytes, kAheadChunk * 2};
    for (int j = 0; j < kB; ++j)
      b[j] = {block.packed + (j * block.k_tiles + k / kTileDepth) * kTileBytes, kTileBytes,
              kRowBytes};
    // One after the other, a whole step and its share of rows would not fit into what the core
    // looks ahead: each unit would wait for the other.
    const bool decodes = next_count > 0;
    for (int64_t s = 0; s < kSteps; ++s) {
      const bool multiplies = s * kTileDepth < count;
      if (multiplies) multiply_quarter<kA, kB, 0>(a, b, s);
      if (decodes) decoder.next(kRowsPerQuarter);
      if (multiplies) multiply_quarter<kA, kB, 1>(a, b, s);
      if (decodes) decoder.next(kRowsPerQuarter);
      if (multiplies) multiply_quarter<kA, kB, 2>(a, b, s);
      if (decodes) decoder.next(kRowsPerQuarter);
      if (multiplies) multiply_quarter<kA, kB, 3>(a, b, s);
      if (decodes) decoder.next(kRowsPerQuarter);
    }
  }
  store_sums<kA * kB>(c);
}

Status run_units(const Block& block, const ThreadPool& pool) {
  const int64_t units = (block.row_end - block.row_begin + block.unit_rows - 1) / block.unit_rows;
  const bool last = block.k_begin + block.k_count == block.params->weight.cols;
  Failure failure;
  pool.run(0, units, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch memory;
    const int64_t weight_bytes = 2 * kAheadBytes;
    const int64_t right_bytes = block.rank_tiles * block.unit_tiles() * kTileBytes;
    const int64_t sum_bytes = block.token_tiles * block.unit_tiles() * kTileBytes;
    const int64_t low_rank_bytes = block.unit_tiles() * kTileBytes;
    const int64_t scale_bytes = block.unit_rows * block.row_scales * 4;
    auto* weights = static_cast<char*>(
        memory.reserve(weight_bytes + right_bytes + sum_bytes + low_rank_bytes + scale_bytes));
    if (!weights) return failure.set();
    char* right = weights + weight_bytes;
    char* own_sums = right + right_bytes;
    char* low_rank = own_sums + sum_bytes;
    const UnitScratch scratch{weights, right, reinterpret_cast<float*>(own_sums),
                              reinterpret_cast<float*>(low_rank),
                              reinterpret_cast<float*>(low_rank + low_rank_bytes)};
    const Session session;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = block.row_begin + unit * block.unit_rows;
      const int64_t rows = std::min(block.unit_rows, block.params->weight.rows - row);
      float* sums = block.waiting ? block.waiting + unit * sum_bytes / 4 : scratch.sums;
      if (block.aligned) decode_unit_scales(block, row, rows, scratch.scales);
      if (block.token_tiles == 1)
        multiply_unit_ahead<4, 1>(block, row, sums, scratch);
      else if (block.token_tiles == 2)
        multiply_unit_ahead<2, 2>(block, row, sums, scratch);
      else
        multiply_unit(block, row, sums, scratch);
      if (last) finish_unit(block, row, rows, sums, scratch);
    }
  });
  return failure.status();
}

// The parts of a block that depend on the tokens alone.
Block token_block(const QuantizedMatmulParams& params, int64_t token) {
  const QuantizedView& weight = params.weight;
  Block block{};
  block.params = &params;
  block.weight = &weight;
  block.token_begin = token;
  block.tokens = std::min(kTokenBlock, params.tokens - token);
  block.token_tiles = (block.tokens + kTileRows - 1) / kTileRows;
  block.unit_rows = block.token_tiles == 1 ? 4 * kTileRows : kChunkRows;
  block.block_shift = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  block.aligned = weight.cols % kTileRun == 0;
  block.uniform = weight.cols % weight.block_size == 0 && weight.block_size >= 2 * kTileRun;
  block.rank_tiles = (params.low_rank.rank + kTileDepth - 1) / kTileDepth;
  return block;
}

}  // namespace

Status quantized_matmul_amx(const QuantizedMatmulParams& params, const ThreadPool& pool) {
  const int64_t N = params.weight.rows, K = params.weight.cols;
  static thread_local Scratch memory;
  for (int64_t token = 0; token < params.tokens; token += kTokenBlock) {
    Block block = token_block(params, token);
    const int64_t row_bytes = block.token_tiles * kTileRows * 2;
    const int64_t k_block = std::max(kChunk, kPackedBytes / row_bytes / kChunk * kChunk);
    const bool waits = K > k_block;
    const int64_t row_block = waits ? kWaitingRows : std::max<int64_t>(N, 1);
    const int64_t packed_bytes = row_bytes * round_up(std::min(k_block, K), kTileDepth);
    const int64_t left_bytes = block.token_tiles * block.rank_tiles * kTileBytes;
    const int64_t wait_rows = waits ? round_up(std::min(N, row_block), block.unit_rows) : 0;
    auto* packed = static_cast<char*>(
        memory.reserve(packed_bytes + left_bytes + wait_rows * block.token_tiles * kTileRows * 4));
    if (!packed) return Status::kOutOfMemory;
    block.packed = packed;
    block.packed_left = packed + packed_bytes;
    block.waiting = waits ? reinterpret_cast<float*>(packed + packed_bytes + left_bytes) : nullptr;
    if (params.low_rank.present()) pack_left(block, packed + packed_bytes);
    for (block.row_begin = 0; block.row_begin < N; block.row_begin = block.row_end) {
      block.row_end = std::min(N, block.row_begin + row_block);
      for (block.k_begin = 0; block.k_begin < std::max<int64_t>(K, 1); block.k_begin += k_block) {
        block.k_count = std::min(k_block, K - block.k_begin);
        block.k_tiles = (block.k_count + kTileDepth - 1) / kTileDepth;
        block.row_scales = block.k_count / params.weight.block_size + 2;
        pool.run(0, block.token_tiles * block.k_tiles, 32,
                 [&](int64_t begin, int64_t end) { pack_x(block, packed, begin, end); });
        const Status status = run_units(block, pool);
        if (status != Status::kOk) return status;
      }
    }
  }
  return Status::kOk;
}

#else

Status quantized_matmul_amx(const QuantizedMatmulParams&, const ThreadPool&) {
  return Status::kUnsupported;
}

#endif

}  // namespace qlk
