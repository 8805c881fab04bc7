// grad_x = grad_y Ŵ on AMX tiles. Packed grad_y is the A operand (16 tokens by 32 of N), decoded
// weights in row pairs are B (32 of N by 16 columns of K), so a result tile is [16 tokens x 16
// columns]. A unit of work is a strip of columns over a chunk of rows.
#include <algorithm>
#include <bit>
#include <cstring>

#include "qlk/amx.h"
#include "qlk/convert.h"
#include "qlk/decode_tiles.h"
#include "qlk/dropout.h"
#include "qlk/isa.h"
#include "qlk/low_rank.h"
#include "qlk/quantized_matmul.h"
#include "qlk/scratch.h"

namespace qlk {

#if defined(QLK_X86)

namespace {

using namespace amx;

constexpr int64_t kTokenBlock = 256;
// Packed grad_y of a block of tokens and of N: half of a 2 MiB second-level cache.
constexpr int64_t kPackedBytes = 1 << 20;
// Columns whose sums wait while N is worked through in blocks: bounds that buffer to 4 MiB.
constexpr int64_t kWaitingCols = 4096;
// Columns of a unit: whole cache lines of codes, or half lines where that leaves threads idle.
constexpr int64_t kWideUnit = 128, kNarrowUnit = 64, kUnitsPerThread = 4;
// Rows decoded at a time: 32 KiB of bf16 per pair of column tiles.
constexpr int64_t kChunk = 512;
constexpr int64_t kPrefetchRows = 16;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One block of tokens against one block of rows for a range of columns.
struct Block {
  const QuantizedMatmulParams* params;
  int64_t token_begin, tokens, token_tiles;
  int64_t row_begin, row_count, row_tiles;
  int64_t col_begin, col_end;
  int64_t unit_cols;
  int block_shift;  // log2 of the weight's block size
  bool aligned;     // every 32 weights of a row share a scale
  bool paired;      // every 64 do, and their number is even
  int64_t rank_tiles;
  const char* packed;       // A tiles [token_tiles][row_tiles]
  const char* packed_left;  // A tiles [token_tiles][rank_tiles] of the low-rank term
  float* waiting;           // C tiles [units][token_tiles][unit tiles], null if N is one block

  int64_t unit_tiles() const { return unit_cols / kTileRows; }
  int64_t unit_pairs() const { return unit_cols / kTileRun; }
};

struct UnitScratch {
  char* weights;    // B tiles [unit pairs][chunk tiles][2]
  char* right;      // B tiles [rank_tiles][unit tiles]
  float* sums;      // C tiles [token_tiles][unit tiles]
  float* low_rank;  // C tiles [unit tiles]
};

// A tile of source [tokens][depth]; zero beyond.
QLK_AMX void pack_rows(const uint16_t* source, int64_t stride, int64_t tokens, int64_t depth,
                       char* tile) {
  const __mmask32 mask = _cvtu32_mask32(first_lanes(depth));
  for (int64_t m = 0; m < kTileRows; ++m)
    _mm512_store_si512(
        tile + m * kRowBytes,
        m < tokens ? _mm512_maskz_loadu_epi16(mask, source + m * stride) : _mm512_setzero_si512());
}

void pack_grad(const Block& block, char* packed, int64_t tile_begin, int64_t tile_end) {
  const auto* grad = static_cast<const uint16_t*>(block.params->x);
  const int64_t N = block.params->weight.rows;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t token = tile / block.row_tiles * kTileRows;
    const int64_t n = tile % block.row_tiles * kTileDepth;
    pack_rows(grad + (block.token_begin + token) * N + block.row_begin + n, N, block.tokens - token,
              block.row_count - n, packed + tile * kTileBytes);
  }
}

void pack_left(const Block& block, char* packed) {
  const LowRankTerm& term = block.params->low_rank;
  alignas(64) uint16_t rows[kTileRows * kTileDepth];
  for (int64_t m = 0; m < block.token_tiles; ++m) {
    const int64_t tokens = std::min(kTileRows, block.tokens - m * kTileRows);
    const float* left = term.left + (block.token_begin + m * kTileRows) * padded_rank(term.rank);
    for (int64_t s = 0; s < block.rank_tiles; ++s, packed += kTileBytes) {
      const int64_t ranks = std::min(kTileDepth, term.rank - s * kTileDepth);
      for (int64_t i = 0; i < tokens; ++i)
        store_f32(left + i * padded_rank(term.rank) + s * kTileDepth, ranks, DType::kBFloat16,
                  Isa::kAmx, rows + i * kTileDepth);
      pack_rows(rows, kTileDepth, tokens, ranks, packed);
    }
  }
}

// Pairs of ranks by 16 columns, in natural order.
void pack_right(const Block& block, int64_t col, int64_t cols, char* packed) {
  const LowRankTerm& term = block.params->low_rank;
  std::memset(packed, 0, static_cast<size_t>(block.rank_tiles * block.unit_tiles() * kTileBytes));
  auto* words = reinterpret_cast<uint16_t*>(packed);
  float run[kWideUnit];
  uint16_t narrow[kWideUnit];
  for (int64_t r = 0; r < term.rank; ++r) {
    load_f32(term.right, term.right_dtype, r * term.right_rank_stride + col, cols, Isa::kAmx, run);
    store_f32(run, cols, DType::kBFloat16, Isa::kAmx, narrow);
    const int64_t pair = r % kTileDepth / 2;
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t tile = r / kTileDepth * block.unit_tiles() + j / kTileRows;
      words[tile * 2 * kTileFloats + pair * 2 * kTileRows + j % kTileRows * 2 + r % 2] = narrow[j];
    }
  }
}

// Result tiles of a unit's columns by 16 tokens to rows of grad_x.
QLK_AMX void store_tokens(const Block& block, int64_t col, int64_t cols, int64_t token,
                          const float* sums, const float* low_rank) {
  const QuantizedMatmulParams& p = *block.params;
  const int64_t K = p.weight.cols;
  // Column 4w + q of a tile is where tile order left 4q + w.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 scaling = _mm512_set1_ps(p.low_rank.scaling);
  const int64_t tokens = std::min(kTileRows, block.tokens - token);
  for (int64_t m = 0; m < tokens; ++m) {
    const int64_t at = (block.token_begin + token + m) * K + col;
    alignas(64) float factors[kWideUnit];
    if (low_rank && p.low_rank.mask.active())
      dropout_factors(p.low_rank.mask, at, cols, Isa::kAmx, factors);
    for (int64_t first = 0; first < cols; first += kTileRows) {
      const int64_t lane = (first + m) * kTileRows;
      const __mmask16 mask = _cvtu32_mask16(first_lanes(std::min(kTileRows, cols - first)));
      __m512 value = _mm512_permutexvar_ps(order, _mm512_load_ps(sums + lane));
      if (low_rank) {
        __m512 product = _mm512_mul_ps(scaling, _mm512_load_ps(low_rank + lane));
        __mmask16 kept = mask;
        if (p.low_rank.mask.active()) {
          const __m512 factor = _mm512_maskz_loadu_ps(mask, factors + first);
          kept = _mm512_cmp_ps_mask(factor, _mm512_setzero_ps(), _CMP_NEQ_UQ);
          product = _mm512_mul_ps(product, factor);
        }
        // A dropped element adds nothing, even where its product is NaN.
        value = _mm512_mask_add_ps(value, kept, value, product);
      }
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.y) + at + first, mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    }
  }
}

QLK_AMX void finish_unit(const Block& block, int64_t col, int64_t cols, const float* sums,
                         const UnitScratch& scratch) {
  const bool low_rank = block.params->low_rank.present();
  if (low_rank) pack_right(block, col, cols, scratch.right);
  const int64_t step = block.unit_tiles() * kTileBytes;
  for (int64_t m = 0; m < block.token_tiles; ++m) {
    for (int64_t j = 0; low_rank && j < block.unit_tiles(); ++j) {
      const TileRun a{block.packed_left + m * block.rank_tiles * kTileBytes, kTileBytes, kRowBytes};
      const TileRun b{scratch.right + j * kTileBytes, step, kRowBytes};
      float* const c = scratch.low_rank + j * kTileFloats;
      multiply_steps<1, 1>(&a, &b, block.rank_tiles, false, &c);
    }
    store_tokens(block, col, cols, m * kTileRows, sums + m * block.unit_tiles() * kTileFloats,
                 low_rank ? scratch.low_rank : nullptr);
  }
}

// Two rows of 32 weights in tile order as a pair of B tile rows.
QLK_AMX QLK_INLINE void store_pair(__m512i even, __m512i odd, char* out) {
  _mm512_store_si512(out, _mm512_unpacklo_epi16(even, odd));
  _mm512_store_si512(out + kTileBytes, _mm512_unpackhi_epi16(even, odd));
}

// Where the pair of rows at n of a chunk goes in the B tiles of 32 columns.
QLK_INLINE int64_t pair_offset(int64_t n) {
  return n / kTileDepth * 2 * kTileBytes + n % kTileDepth / 2 * kRowBytes;
}
constexpr int64_t kPairBytes = kChunk / kTileDepth * 2 * kTileBytes;

// A row pair of kRuns times 32 columns from `flat`, which share a scale in each row.
template <int kRuns>
QLK_AMX QLK_INLINE void decode_pair(const QuantizedView& weight, const ScaleReader& scale_of,
                                    int block_shift, __m512 codebook, int64_t flat, char* out) {
  const uint8_t* codes = weight.codes + flat / 2;
  const uint8_t* below = codes + weight.cols / 2;
  const __m512i even = bf16_table(codebook, scale_of(flat >> block_shift));
  const __m512i odd = bf16_table(codebook, scale_of((flat + weight.cols) >> block_shift));
  QLK_UNROLL
  for (int i = 0; i < kRuns; ++i)
    store_pair(_mm512_permutexvar_epi16(tile_codes(codes + 16 * i), even),
               _mm512_permutexvar_epi16(tile_codes(below + 16 * i), odd), out + i * kPairBytes);
}

QLK_AMX __m512i decode_any(const QuantizedView& weight, int64_t row, int64_t row_end, int64_t col,
                           int64_t cols) {
  if (row >= row_end || cols <= 0) return _mm512_setzero_si512();
  alignas(64) uint16_t words[kTileRun];
  decode_ragged(weight, row * weight.cols + col, std::min(cols, kTileRun), words);
  return _mm512_load_si512(words);
}

// Rows [row, row + count) of a unit's columns, as B tiles; zero up to a multiple of 32 rows.
QLK_AMX void decode_chunk(const Block& block, int64_t row, int64_t count, int64_t col, int64_t cols,
                          char* out) {
  const QuantizedView& weight = block.params->weight;
  const ScaleReader scale_of(weight.scales);
  const __m512 codebook = _mm512_loadu_ps(weight.codebook);
  const int64_t even_count = count / 2 * 2;
  for (int64_t n = 0; block.aligned && n < even_count; n += 2) {
    const int64_t flat = (row + n) * weight.cols + col;
    char* pair = out + pair_offset(n);
    const auto* ahead =
        reinterpret_cast<const char*>(weight.codes + flat / 2) + kPrefetchRows * weight.cols / 2;
    _mm_prefetch(ahead, _MM_HINT_T0);
    _mm_prefetch(ahead + weight.cols / 2, _MM_HINT_T0);
    int64_t j = 0;
    for (; block.paired && j + 2 * kTileRun <= cols; j += 2 * kTileRun)
      decode_pair<2>(weight, scale_of, block.block_shift, codebook, flat + j,
                     pair + j / kTileRun * kPairBytes);
    for (; j < cols; j += kTileRun)
      decode_pair<1>(weight, scale_of, block.block_shift, codebook, flat + j,
                     pair + j / kTileRun * kPairBytes);
  }
  // Rows of any phase, and zeros for those that fill up the last tile.
  for (int64_t n = block.aligned ? even_count : 0; n < round_up(count, kTileDepth); n += 2)
    for (int64_t j = 0; j < cols; j += kTileRun)
      store_pair(decode_any(weight, row + n, row + count, col + j, cols - j),
                 decode_any(weight, row + n + 1, row + count, col + j, cols - j),
                 out + pair_offset(n) + j / kTileRun * kPairBytes);
}

// Adds a chunk's products to the sums of a pair of column tiles, for every token.
QLK_AMX void multiply_pair(const Block& block, const char* packed, const char* weights,
                           int64_t steps, bool accumulate, float* sums) {
  const int64_t a_run = block.row_tiles * kTileBytes;
  const int64_t c_step = block.unit_tiles() * kTileFloats;
  const TileRun b[2] = {{weights, 2 * kTileBytes, kRowBytes},
                        {weights + kTileBytes, 2 * kTileBytes, kRowBytes}};
  int64_t m = 0;
  for (; m + 2 <= block.token_tiles; m += 2) {
    const TileRun a[2] = {{packed + m * a_run, kTileBytes, kRowBytes},
                          {packed + (m + 1) * a_run, kTileBytes, kRowBytes}};
    float* tile = sums + m * c_step;
    float* const c[4] = {tile, tile + kTileFloats, tile + c_step, tile + c_step + kTileFloats};
    multiply_steps<2, 2>(a, b, steps, accumulate, c);
  }
  if (m < block.token_tiles) {
    const TileRun a{packed + m * a_run, kTileBytes, kRowBytes};
    float* tile = sums + m * c_step;
    float* const c[2] = {tile, tile + kTileFloats};
    multiply_steps<1, 2>(&a, b, steps, accumulate, c);
  }
}

// The same for one tile of tokens and two pairs of column tiles: four sums hide the latency.
QLK_AMX void multiply_pairs(const char* packed, const char* weights, int64_t steps, bool accumulate,
                            float* sums) {
  const TileRun a{packed, kTileBytes, kRowBytes};
  TileRun b[4];
  float* c[4];
  for (int j = 0; j < 4; ++j) {
    b[j] = {weights + j / 2 * kPairBytes + j % 2 * kTileBytes, 2 * kTileBytes, kRowBytes};
    c[j] = sums + j * kTileFloats;
  }
  multiply_steps<1, 4>(&a, b, steps, accumulate, c);
}

// Sums of a unit over the block of rows.
QLK_AMX void multiply_unit(const Block& block, int64_t col, int64_t cols, float* sums,
                           const UnitScratch& scratch) {
  for (int64_t n = 0; n < block.row_count; n += kChunk) {
    const int64_t count = std::min(kChunk, block.row_count - n);
    const int64_t steps = round_up(count, kTileDepth) / kTileDepth;
    decode_chunk(block, block.row_begin + n, count, col, cols, scratch.weights);
    const bool accumulate = block.row_begin + n > 0;
    const char* packed = block.packed + n / kTileDepth * kTileBytes;
    const int64_t pairs = (cols + kTileRun - 1) / kTileRun;
    int64_t j = 0;
    for (; block.token_tiles == 1 && j + 2 <= pairs; j += 2)
      multiply_pairs(packed, scratch.weights + j * kPairBytes, steps, accumulate,
                     sums + j * 2 * kTileFloats);
    for (; j < pairs; ++j)
      multiply_pair(block, packed, scratch.weights + j * kPairBytes, steps, accumulate,
                    sums + j * 2 * kTileFloats);
  }
}

Status run_units(const Block& block, const ThreadPool& pool) {
  const int64_t units = (block.col_end - block.col_begin + block.unit_cols - 1) / block.unit_cols;
  const bool last = block.row_begin + block.row_count == block.params->weight.rows;
  Failure failure;
  pool.run(0, units, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch memory;
    const int64_t weight_bytes = block.unit_pairs() * kPairBytes;
    const int64_t right_bytes = block.rank_tiles * block.unit_tiles() * kTileBytes;
    const int64_t sum_bytes = block.token_tiles * block.unit_tiles() * kTileBytes;
    auto* weights = static_cast<char*>(
        memory.reserve(weight_bytes + right_bytes + sum_bytes + block.unit_tiles() * kTileBytes));
    if (!weights) return failure.set();
    char* right = weights + weight_bytes;
    char* own_sums = right + right_bytes;
    const UnitScratch scratch{weights, right, reinterpret_cast<float*>(own_sums),
                              reinterpret_cast<float*>(own_sums + sum_bytes)};
    const Session session;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t col = block.col_begin + unit * block.unit_cols;
      const int64_t cols = std::min(block.unit_cols, block.params->weight.cols - col);
      float* sums = block.waiting ? block.waiting + unit * sum_bytes / 4 : scratch.sums;
      multiply_unit(block, col, cols, sums, scratch);
      if (last) finish_unit(block, col, cols, sums, scratch);
    }
  });
  return failure.status();
}

Block token_block(const QuantizedMatmulParams& params, int64_t token, int num_threads) {
  const QuantizedView& weight = params.weight;
  Block block{};
  block.params = &params;
  block.token_begin = token;
  block.tokens = std::min(kTokenBlock, params.tokens - token);
  block.token_tiles = (block.tokens + kTileRows - 1) / kTileRows;
  block.unit_cols =
      weight.cols >= kWideUnit * kUnitsPerThread * num_threads ? kWideUnit : kNarrowUnit;
  block.block_shift = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  block.aligned = weight.cols % kTileRun == 0;
  block.paired = weight.cols % (2 * kTileRun) == 0 && weight.block_size >= 2 * kTileRun;
  block.rank_tiles = (params.low_rank.rank + kTileDepth - 1) / kTileDepth;
  return block;
}

}  // namespace

Status quantized_matmul_backward_amx(const QuantizedMatmulParams& params, const ThreadPool& pool) {
  const int64_t N = params.weight.rows, K = params.weight.cols;
  static thread_local Scratch memory;
  for (int64_t token = 0; token < params.tokens; token += kTokenBlock) {
    Block block = token_block(params, token, pool.num_threads);
    const int64_t row_bytes = block.token_tiles * kTileRows * 2;
    const int64_t row_block = std::max(kChunk, kPackedBytes / row_bytes / kChunk * kChunk);
    const bool waits = N > row_block;
    const int64_t col_block = waits ? kWaitingCols : std::max<int64_t>(K, 1);
    const int64_t packed_bytes = row_bytes * round_up(std::min(row_block, N), kTileDepth);
    const int64_t left_bytes = block.token_tiles * block.rank_tiles * kTileBytes;
    const int64_t wait_cols = waits ? round_up(std::min(K, col_block), block.unit_cols) : 0;
    auto* packed = static_cast<char*>(
        memory.reserve(packed_bytes + left_bytes + wait_cols * block.token_tiles * kTileRows * 4));
    if (!packed) return Status::kOutOfMemory;
    block.packed = packed;
    block.packed_left = packed + packed_bytes;
    block.waiting = waits ? reinterpret_cast<float*>(packed + packed_bytes + left_bytes) : nullptr;
    if (params.low_rank.present()) pack_left(block, packed + packed_bytes);
    for (block.col_begin = 0; block.col_begin < K; block.col_begin = block.col_end) {
      block.col_end = std::min(K, block.col_begin + col_block);
      for (block.row_begin = 0; block.row_begin < std::max<int64_t>(N, 1);
           block.row_begin += row_block) {
        block.row_count = std::min(row_block, N - block.row_begin);
        block.row_tiles = (block.row_count + kTileDepth - 1) / kTileDepth;
        pool.run(0, block.token_tiles * block.row_tiles, 32,
                 [&](int64_t begin, int64_t end) { pack_grad(block, packed, begin, end); });
        const Status status = run_units(block, pool);
        if (status != Status::kOk) return status;
      }
    }
  }
  return Status::kOk;
}

#else

Status quantized_matmul_backward_amx(const QuantizedMatmulParams&, const ThreadPool&) {
  return Status::kUnsupported;
}

#endif

}  // namespace qlk
