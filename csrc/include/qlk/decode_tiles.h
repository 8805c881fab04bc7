// Decodes weights to bf16 as the AMX kernels want them: each 32 weights in tile order.
//
// Tile order puts weight 4w + p of a run of 32 at word 8p + w. A 16-byte load, broadcast to the
// four 128-bit parts, then needs one variable shift: part p takes nibble p of every 16-bit word.
#pragma once

#include <algorithm>

#include "qlk/decode_span.h"

#if defined(QLK_X86)

namespace qlk {

constexpr int64_t kTileRun = 32;

// Where word i of a run in tile order comes from in natural order.
struct TileOrder {
  alignas(64) uint16_t source[kTileRun];
};
constexpr TileOrder make_tile_order() {
  TileOrder order{};
  for (int i = 0; i < kTileRun; ++i) order.source[i] = static_cast<uint16_t>(4 * (i % 8) + i / 8);
  return order;
}
inline constexpr TileOrder kTileOrder = make_tile_order();

// 32 words in natural order to tile order.
QLK_AVX512 QLK_INLINE __m512i to_tile_order(__m512i words) {
  return _mm512_permutexvar_epi16(_mm512_load_si512(kTileOrder.source), words);
}

// The codes of 32 weights from 16 bytes, in tile order, as indices for bf16_table: bit 4 and up are
// those of other weights.
QLK_AVX512_BF16 QLK_INLINE __m512i tile_codes(const uint8_t* bytes) {
  // A little-endian word holds weights 0 ... 3 at bits 4, 0, 12, 8.
  const __m512i shifts =
      _mm512_setr_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x000c000c000c000c,
                        0x000c000c000c000c, 0x0008000800080008, 0x0008000800080008);
  const __m512i words =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_srlv_epi16(words, shifts);
}

// A run of weights within one row, every 32 of which lie in one block: K % 32 == 0.
struct AlignedRun {
  const uint8_t* codes;
  const float* scales;  // scales[0] is that of the block `phase` weights before the run.
  int64_t phase;
  int block_shift;
};

// `count`, a multiple of 32, weights to `out` in tile order.
QLK_AVX512_BF16 QLK_INLINE void decode_tiles(const AlignedRun& run, int64_t count, __m512 codebook,
                                             uint16_t* out) {
  for (int64_t i = 0; i < count; i += kTileRun) {
    const __m512i table = bf16_table(codebook, run.scales[(run.phase + i) >> run.block_shift]);
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(tile_codes(run.codes + i / 2), table));
  }
}

// Rows whose blocks begin at the same columns, kGroups times 64 weights of each, every 64 of which
// lie in one block. Strides are in elements of what they step over.
struct UniformRows {
  const uint8_t* codes;
  int64_t code_stride;
  const float* scales;
  int64_t scale_stride;
  int64_t prefetch;  // How far ahead of the codes the next ones to be decoded are.
};

// Returns the rows that follow.
template <int kGroups>
QLK_AVX512_BF16 QLK_INLINE UniformRows decode_uniform(UniformRows rows, int64_t count,
                                                      const int* scale_of, __m512 codebook,
                                                      int64_t out_stride, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    QLK_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const uint8_t* codes = rows.codes + 32 * g;
      // Two groups are a cache line of codes.
      if (g % 2 == 0)
        _mm_prefetch(reinterpret_cast<const char*>(codes) + rows.prefetch, _MM_HINT_T0);
      const __m512i table = bf16_table(codebook, rows.scales[scale_of[g]]);
      _mm512_store_si512(out + 64 * g, _mm512_permutexvar_epi16(tile_codes(codes), table));
      _mm512_store_si512(out + 64 * g + 32,
                         _mm512_permutexvar_epi16(tile_codes(codes + 16), table));
    }
    rows.codes += rows.code_stride;
    rows.scales += rows.scale_stride;
    out += out_stride;
  }
  return rows;
}

// Any run of `count` weights from flat index `begin`, in tile order, zero up to a multiple of 32.
QLK_AVX512_BF16 QLK_INLINE void decode_ragged(const QuantizedView& weight, int64_t begin,
                                              int64_t count, uint16_t* out) {
  decode_span_bf16(weight, begin, count, Isa::kAvx512Bf16, out);
  for (int64_t i = count; i % kTileRun != 0; ++i) out[i] = 0;
  for (int64_t i = 0; i < count; i += kTileRun)
    _mm512_storeu_si512(out + i, to_tile_order(_mm512_loadu_si512(out + i)));
}

// The columns of a weight from k_begin on, for which a caller decodes the scales of a row at a
// time.
struct ColumnBlock {
  const QuantizedView* weight;
  int64_t k_begin;
  int64_t row_scales;  // Scales a row may need.
  int block_shift;     // log2 of the weight's block size.
  bool aligned;        // Every 32 weights of a row share a scale.
  bool uniform;        // Every 64 do, and blocks begin at the same columns of every row.
};

// Decodes a chunk: weights [k, k + count) of a block of columns, for rows in order, to
// out with kStride weights between rows; zero up to a multiple of 32 and in rows beyond the weight.
template <int64_t kStride>
class ChunkDecoder {
 public:
  QLK_AVX512_BF16 ChunkDecoder(const ColumnBlock& block, int64_t row, int64_t k, int64_t count,
                               int64_t prefetch, const float* scales, char* weights)
      : block_(block),
        row_(row),
        k_(k),
        count_(count),
        scales_(scales),
        out_(reinterpret_cast<uint16_t*>(weights)),
        uniform_(block.uniform && count == kStride) {
    const QuantizedView& weight = *block.weight;
    const int64_t phase = (block.k_begin & (weight.block_size - 1)) + k;
    for (int g = 0; g < kGroups; ++g)
      scale_of_[g] = static_cast<int>((phase + 64 * g) >> block.block_shift);
    const int64_t flat = row * weight.cols + block.k_begin + k;
    rows_ = {weight.codes + flat / 2, weight.cols / 2, scales, block.row_scales, prefetch};
  }

  QLK_AVX512_BF16 QLK_INLINE void next(int64_t rows) {
    const QuantizedView& weight = *block_.weight;
    const __m512 codebook = _mm512_loadu_ps(weight.codebook);
    const int64_t there = std::clamp<int64_t>(weight.rows - row_, 0, rows);
    if (uniform_) {
      rows_ = decode_uniform<kGroups>(rows_, there, scale_of_, codebook, kStride, out_);
    } else {
      for (int64_t i = 0; i < there; ++i, scales_ += block_.row_scales)
        decode_row(weight, row_ + i, codebook, out_ + i * kStride);
    }
    if (there < rows) std::fill_n(out_ + there * kStride, (rows - there) * kStride, uint16_t{0});
    row_ += rows;
    out_ += rows * kStride;
  }

 private:
  static constexpr int kGroups = kStride / 64;

  QLK_AVX512_BF16 void decode_row(const QuantizedView& weight, int64_t row, __m512 codebook,
                                  uint16_t* out) const {
    const int64_t flat = row * weight.cols + block_.k_begin;
    if (block_.aligned)
      decode_tiles({weight.codes + (flat + k_) / 2, scales_, (flat & (weight.block_size - 1)) + k_,
                    block_.block_shift},
                   count_, codebook, out);
    else
      decode_ragged(weight, flat + k_, count_, out);
  }

  const ColumnBlock& block_;
  int64_t row_, k_, count_;
  const float* scales_;
  uint16_t* out_;
  bool uniform_;
  int scale_of_[kGroups];
  UniformRows rows_;
};

}  // namespace qlk

#endif
