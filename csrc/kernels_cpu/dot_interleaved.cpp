// The AVX-512 inner product that keeps decoded weights in registers. A group is 128 weights, 64
// bytes of codes, 16 words of 8 nibbles; word j holds weights 8j ... 8j + 7. vpermps looks at the
// low 4 bits of a lane only, so a shift is all that a lookup needs. The lookups are in the unscaled
// codebook: each lane's 8 products are summed and then multiplied by the scale of its block, which
// is one block if K % 8 == 0.
#include <algorithm>
#include <bit>

#include "qlk/convert.h"
#include "qlk/decode_scales.h"
#include "qlk/dot.h"
#include "qlk/isa.h"

namespace qlk {
namespace {

constexpr int64_t kGroup = 128;
constexpr int64_t kLaneWeights = 8;
constexpr int64_t kTokens = 4;     // With two rows: sums, products, codes and the table fit 32.
constexpr int64_t kScaleRows = 8;  // Rows whose scales are decoded at a time.
// Bytes of codes ahead: into the second-level cache, where requests in flight are not limited to
// the few of the first, and from there into the first.
constexpr int64_t kFarPrefetch = 16384, kNearPrefetch = 512;

// Scales a row may touch, and the 16 that a group reads at once.
int64_t scales_of_row(const QuantizedView& weight) { return weight.cols / weight.block_size + 18; }

}  // namespace

bool strip_interleaved_runs(const QuantizedView& weight, Isa isa) {
#if defined(QLK_X86)
  return isa >= Isa::kAvx512 && weight.cols % kLaneWeights == 0;
#else
  return false;
#endif
}

int64_t interleaved_row(int64_t cols) { return (cols + kGroup - 1) / kGroup * kGroup; }

int64_t interleaved_scale_count(const QuantizedView& weight) {
  return kScaleRows * scales_of_row(weight);
}

#if defined(QLK_X86)

namespace {

// Group layout: vector 2b holds the even weight of byte b of each word, vector 2b + 1 the odd one.
QLK_AVX512 void interleave_f32(const float* x, int64_t cols, float* out) {
  const __m512i index =
      _mm512_mullo_epi32(_mm512_set1_epi32(kLaneWeights),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t k = 0; k < cols; k += kGroup) {
    const int64_t lanes = std::min<int64_t>(16, (cols - k) / kLaneWeights);
    const __mmask16 mask = _cvtu32_mask16((1u << lanes) - 1u);
    for (int e = 0; e < kLaneWeights; ++e) {
      const __m512 lane = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, x + k + e, 4);
      _mm512_storeu_ps(out + k + 16 * e, lane);
    }
  }
}

struct Row {
  const uint8_t* codes;  // Of the row's first weight; K % 8 == 0 makes it a byte boundary.
  const float* scales;   // Of the blocks the row touches.
  int64_t block_phase;   // Of the first weight in its block.
};

struct Shape {
  int64_t rows, cols;
  int block_shift;  // log2(block_size)
  __m512 table;     // The codebook.
};

// Columns of the rows before `end` whose codes have readable bytes behind them.
int64_t readable_cols(const Shape& shape, int64_t end) {
  return end < shape.rows ? shape.cols : shape.cols - kLaneWeights;
}

// Which of the scales that follow a group's first one belongs to each lane.
QLK_AVX512 QLK_INLINE __m512i lane_blocks(int64_t position, int block_shift) {
  const __m512i lane =
      _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 3);
  const auto phase = static_cast<int>(position & ((int64_t{1} << block_shift) - 1));
  return _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(phase)),
                          _mm_cvtsi32_si128(block_shift));
}

// Without it gcc folds a load into each of its uses, and loads are what the loop runs out of next.
template <class Vector>
QLK_AVX512 QLK_INLINE void keep_in_register(Vector& vector) {
  __asm__("" : "+v"(vector));
}

// Where a group's codes come from. Byte loads fetch the group four times, a byte further each time,
// which saves three of seven shifts, the busier half of the vector units, and touch up to three
// bytes beyond the group.
enum class Fetch { kByteLoads, kMasked };

// The lanes whose low 4 bits are weight e of each word: the high nibble of byte e / 2 if e is even,
// else its low nibble.
template <Fetch kFetch>
QLK_AVX512 QLK_INLINE __m512i codes_of(const uint8_t* codes, int e, __m512i& word) {
  if constexpr (kFetch == Fetch::kByteLoads) {
    if (e % 2) return word;
    word = _mm512_loadu_si512(codes + e / 2);
    keep_in_register(word);
    return _mm512_srli_epi32(word, 4);
  }
  const auto shift = static_cast<unsigned>(4 * (e ^ 1));
  return shift == 0 ? word : _mm512_srli_epi32(word, shift);
}

// Adds a group's products to sums[row][token]. Lanes outside the mask are those beyond K: they hold
// code 0 against zeros of x, and the scale of another row, possibly NaN, must not reach them.
template <int kRows, int kCount, Fetch kFetch>
QLK_AVX512 QLK_INLINE void add_group(const Shape& shape, const Row* rows, const __m512i* blocks,
                                     int64_t k, __mmask16 mask, const float* x, int64_t x_stride,
                                     __m512 (*sums)[kCount]) {
  __m512i word[kRows];
  QLK_UNROLL
  for (int r = 0; r < kRows; ++r)
    if (kFetch == Fetch::kMasked) word[r] = _mm512_maskz_loadu_epi32(mask, rows[r].codes + k / 2);
  __m512 partial[kRows][kCount];
  QLK_UNROLL
  for (int e = 0; e < kLaneWeights; ++e) {
    __m512 value[kRows];
    QLK_UNROLL
    for (int r = 0; r < kRows; ++r)
      value[r] =
          _mm512_permutexvar_ps(codes_of<kFetch>(rows[r].codes + k / 2, e, word[r]), shape.table);
    QLK_UNROLL
    for (int t = 0; t < kCount; ++t) {
      __m512 factor = _mm512_loadu_ps(x + t * x_stride + k + 16 * e);
      if (kRows > 1) keep_in_register(factor);
      QLK_UNROLL
      for (int r = 0; r < kRows; ++r)
        partial[r][t] = e == 0 ? _mm512_mul_ps(value[r], factor)
                               : _mm512_fmadd_ps(value[r], factor, partial[r][t]);
    }
  }
  QLK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float* first = rows[r].scales + ((rows[r].block_phase + k) >> shape.block_shift);
    const __m512 scale = kFetch == Fetch::kByteLoads
                             ? _mm512_permutexvar_ps(blocks[r], _mm512_loadu_ps(first))
                             : _mm512_maskz_permutexvar_ps(mask, blocks[r], _mm512_loadu_ps(first));
    QLK_UNROLL
    for (int t = 0; t < kCount; ++t) sums[r][t] = _mm512_fmadd_ps(scale, partial[r][t], sums[r][t]);
  }
}

// out[t * out_stride + r * row_stride] = x[t] · rows[r] for kCount tokens and kRows rows. A (token,
// row) pair's additions have one order, whatever kRows and kCount are.
template <int kRows, int kCount, bool kFixedPhase>
QLK_AVX512 __attribute__((noinline)) void products(const Shape& shape, const Row* rows,
                                                   int64_t readable, const float* x,
                                                   int64_t x_stride, int64_t out_stride,
                                                   int64_t row_stride, float* out) {
  __m512 sums[kRows][kCount];
  __m512i blocks[kRows];
  QLK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    QLK_UNROLL
    for (int t = 0; t < kCount; ++t) sums[r][t] = _mm512_setzero_ps();
    blocks[r] = lane_blocks(rows[r].block_phase, shape.block_shift);
  }
  int64_t k = 0;
  for (; k + kGroup <= readable; k += kGroup) {
    QLK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const char* bytes = reinterpret_cast<const char*>(rows[r].codes) + k / 2;
      _mm_prefetch(bytes + kFarPrefetch, _MM_HINT_T1);
      _mm_prefetch(bytes + kNearPrefetch, _MM_HINT_T0);
      if constexpr (!kFixedPhase)
        blocks[r] = lane_blocks(rows[r].block_phase + k, shape.block_shift);
    }
    add_group<kRows, kCount, Fetch::kByteLoads>(shape, rows, blocks, k, 0xffff, x, x_stride, sums);
  }
  for (; k < shape.cols; k += kGroup) {
    const int64_t lanes = std::min<int64_t>(16, (shape.cols - k) / kLaneWeights);
    QLK_UNROLL
    for (int r = 0; r < kRows; ++r)
      blocks[r] = lane_blocks(rows[r].block_phase + k, shape.block_shift);
    add_group<kRows, kCount, Fetch::kMasked>(shape, rows, blocks, k,
                                             _cvtu32_mask16((1u << lanes) - 1u), x, x_stride, sums);
  }
  QLK_UNROLL
  for (int t = 0; t < kCount; ++t) {
    QLK_UNROLL
    for (int r = 0; r < kRows; ++r)
      out[t * out_stride + r * row_stride] = _mm512_reduce_add_ps(sums[r][t]);
  }
}

template <int kRows, bool kFixedPhase>
QLK_AVX512 void products_of_tokens(const Shape& shape, const Row* rows, int64_t readable,
                                   const float* x, int64_t tokens, int64_t x_stride,
                                   int64_t out_stride, int64_t row_stride, float* out) {
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const float* first = x + t * x_stride;
    float* result = out + t * out_stride;
    switch (std::min(kTokens, tokens - t)) {
      case 1:
        products<kRows, 1, kFixedPhase>(shape, rows, readable, first, x_stride, out_stride,
                                        row_stride, result);
        break;
      case 2:
        products<kRows, 2, kFixedPhase>(shape, rows, readable, first, x_stride, out_stride,
                                        row_stride, result);
        break;
      case 3:
        products<kRows, 3, kFixedPhase>(shape, rows, readable, first, x_stride, out_stride,
                                        row_stride, result);
        break;
      default:
        products<kRows, kTokens, kFixedPhase>(shape, rows, readable, first, x_stride, out_stride,
                                              row_stride, result);
    }
  }
}

template <bool kFixedPhase>
QLK_AVX512 void strip_avx512(const QuantizedView& weight, const Shape& shape, const float* x,
                             int64_t tokens, int64_t row_begin, int64_t rows, float* scales,
                             int64_t out_stride, float* out) {
  const int64_t K = weight.cols, x_stride = interleaved_row(K);
  const int64_t row_scales = scales_of_row(weight);
  for (int64_t begin = 0; begin < rows; begin += kScaleRows) {
    const int64_t count = std::min(kScaleRows, rows - begin);
    Row batch[kScaleRows];
    // Ahead of their use: a load that spans two stores would wait for them to leave the store
    // buffer.
    for (int64_t i = 0; i < count; ++i) {
      const int64_t flat = (row_begin + begin + i) * K, block = flat >> shape.block_shift;
      batch[i] = {weight.codes + flat / 2, scales + i * row_scales, flat & (weight.block_size - 1)};
      decode_scales_avx512(weight.scales, block, ((flat + K - 1) >> shape.block_shift) - block + 1,
                           scales + i * row_scales);
    }
    // Rows are taken in pairs that lie half a batch apart: the hardware prefetches one ascending
    // stream per page, and neighbours share pages.
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half; ++i) {
      const Row pair[2] = {batch[i], batch[i + half]};
      products_of_tokens<2, kFixedPhase>(shape, pair,
                                         readable_cols(shape, row_begin + begin + i + half + 1), x,
                                         tokens, x_stride, out_stride, half, out + begin + i);
    }
    if (count % 2 != 0)
      products_of_tokens<1, kFixedPhase>(shape, batch + count - 1,
                                         readable_cols(shape, row_begin + begin + count), x, tokens,
                                         x_stride, out_stride, 0, out + begin + count - 1);
  }
}

}  // namespace

void interleave_row(const void* x, DType dtype, int64_t cols, float* out) {
  if (dtype == DType::kFloat32) return interleave_f32(static_cast<const float*>(x), cols, out);
  constexpr int64_t kRun = 8 * kGroup;
  float run[kRun];
  for (int64_t k = 0; k < cols; k += kRun) {
    const int64_t count = std::min(kRun, cols - k);
    load_f32(x, dtype, k, count, Isa::kAvx512, run);
    interleave_f32(run, count, out + k);
  }
}

QLK_AVX512 void strip_interleaved(const QuantizedView& weight, const float* x, int64_t tokens,
                                  int64_t row_begin, int64_t rows, float* scales,
                                  int64_t out_stride, float* out) {
  const Shape shape{weight.rows, weight.cols,
                    std::countr_zero(static_cast<uint64_t>(weight.block_size)),
                    _mm512_loadu_ps(weight.codebook)};
  // A group that is a whole number of blocks finds each one in the same phase.
  if (kGroup % weight.block_size == 0)
    strip_avx512<true>(weight, shape, x, tokens, row_begin, rows, scales, out_stride, out);
  else
    strip_avx512<false>(weight, shape, x, tokens, row_begin, rows, scales, out_stride, out);
}

#else

void interleave_row(const void*, DType, int64_t, float*) {}
void strip_interleaved(const QuantizedView&, const float*, int64_t, int64_t, int64_t, float*,
                       int64_t, float*) {}

#endif

}  // namespace qlk
