// The AVX-512 inner products that keep decoded weights in registers. A group is 128 weights, 64
// bytes of codes, 16 lanes of 8 nibbles; lane j holds weights 8j ... 8j + 7, counted from the last
// multiple of 8 before the row's first weight. Look-ups are in the unscaled codebook: each lane's 8
// products are summed and then multiplied by the scale of its block, which is one block because
// block sizes are multiples of 8. What lies in a row's first and last lane of the rows beside it
// meets zeros of x.
//
// x multiplies in fp32, or, bf16 x where the CPU has AVX512_VNNI, as 16-bit integers that share an
// exponent in each lane, with a codebook of 14 bits, in exact 32-bit sums: twice the products per
// instruction. A number of x is then off by at most 2^-15 of the largest of its lane, and exact
// down to 1/128 of that.
#include <algorithm>
#include <bit>
#include <cmath>

#include "qlk/decode_scales.h"
#include "qlk/dot.h"
#include "qlk/interleave.h"
#include "qlk/isa.h"

namespace qlk {
namespace {

constexpr int64_t kTokens = 4;  // With two rows: sums, products, codes and the table fit 32.
// Rows whose scales are decoded at a time, and the rows between those of a pair: every 8th row
// starts in the same phase of 8 weights, and the hardware prefetches one ascending stream per page,
// so that the rows of a pair should not share pages.
constexpr int64_t kScaleRows = 16, kPairRows = 8;
// Bytes of codes ahead into the first-level cache. The second, where requests in flight are not
// limited to the few of the first, gets the next rows' while these are worked on.
constexpr int64_t kNearPrefetch = 512;
// Bytes beyond a group that Fetch::kByteLoads may touch.
constexpr int64_t kReadBeyond = 3;

// Scales a row may touch, and the 16 that a group reads at once.
int64_t scales_of_row(const QuantizedView& weight) { return weight.cols / weight.block_size + 18; }

}  // namespace

bool strip_interleaved_runs(Isa isa) {
#if defined(QLK_X86)
  return isa >= Isa::kAvx512;
#else
  return false;
#endif
}

int64_t interleaved_scale_count(const QuantizedView& weight) {
  return kScaleRows * scales_of_row(weight);
}

#if defined(QLK_X86)

namespace {

struct Row {
  const uint8_t* codes;  // Of the row's first lane.
  const float* scales;   // Of the blocks the row touches.
  int64_t block_phase;   // Of the first lane in its block.
  int64_t weights;       // From the first lane's to the row's last.
  int64_t whole;         // Groups whose lanes are all the row's, with readable bytes behind them.
};

struct Shape {
  int block_shift;    // log2(block_size)
  int64_t next_rows;  // Bytes from a row to the one that comes in its place.
  __m512i table;      // As the products look it up.
  float factor;       // What the products of that table are short of.
};

int64_t next_rows(const QuantizedView& weight) { return kScaleRows * weight.cols / 2; }

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

// Where a group's codes come from. Byte loads fetch the group again, some bytes further, instead of
// shifting it, which is the busier half of the vector units, and touch up to kReadBeyond bytes
// behind the group. Masked, the row may end in the group.
enum class Fetch { kByteLoads, kMasked };

// The codes of `weights` weights, then zeros. What fills up the last byte of all is no code, and
// the entries of a table that no code means may be NaN.
QLK_AVX512 QLK_INLINE __m512i masked_codes(const uint8_t* codes, int64_t weights) {
  if (weights >= kGroup) return _mm512_loadu_si512(codes);
  const int64_t bytes = (weights + 1) / 2;
  const __mmask64 mask = _cvtu64_mask64((uint64_t{1} << bytes) - 1);
  const __mmask64 half = _cvtu64_mask64(weights % 2 == 0 ? 0 : uint64_t{1} << (bytes - 1));
  return _mm512_andnot_si512(_mm512_maskz_set1_epi8(half, 0x0f),
                             _mm512_maskz_loadu_epi8(mask, codes));
}

// Products in fp32: vpermps looks at the low 4 bits of a 32-bit lane only.
struct FloatProducts {
  static constexpr XLayout kLayout = XLayout::kFloat;
  static constexpr int kLookUps = 8;
  using Sum = __m512;

  QLK_AVX512 static Shape shape(const QuantizedView& weight, int block_shift) {
    return {block_shift, next_rows(weight), _mm512_loadu_si512(weight.codebook), 1.0f};
  }

  // The lanes whose low 4 bits are weight e: the high nibble of byte e / 2 if e is even, else its
  // low nibble.
  template <Fetch kFetch>
  QLK_AVX512 static QLK_INLINE __m512i codes(const uint8_t* codes, int e, __m512i& word) {
    if constexpr (kFetch == Fetch::kByteLoads) {
      if (e % 2) return word;
      word = _mm512_loadu_si512(codes + e / 2);
      keep_in_register(word);
      return _mm512_srli_epi32(word, 4);
    }
    const auto shift = static_cast<unsigned>(4 * (e ^ 1));
    return shift == 0 ? word : _mm512_srli_epi32(word, shift);
  }

  QLK_AVX512 static QLK_INLINE __m512i look_up(__m512i codes, __m512i table) {
    return _mm512_castps_si512(_mm512_permutexvar_ps(codes, _mm512_castsi512_ps(table)));
  }

  QLK_AVX512 static QLK_INLINE Sum add(int e, __m512i value, __m512i factor, Sum sum) {
    const __m512 a = _mm512_castsi512_ps(value), b = _mm512_castsi512_ps(factor);
    return e == 0 ? _mm512_mul_ps(a, b) : _mm512_fmadd_ps(a, b, sum);
  }

  QLK_AVX512 static QLK_INLINE __m512 finish(Sum sum, const float*) { return sum; }
};

// Products as integers, of levels from kAvx512Bf16 on: a 16-bit lane holds 4 nibbles, vpermw looks
// at its low 5 bits, and the table is there twice. vpermw takes both vector ports (Golden Cove),
// which makes 18 operations of 22.
struct IntegerProducts {
  static constexpr XLayout kLayout = XLayout::kInteger;
  static constexpr int kLookUps = 4;
  using Sum = __m512i;

  QLK_AVX512 static Shape shape(const QuantizedView& weight, int block_shift) {
    float most = 0.0f;
    for (int i = 0; i < 16; ++i) most = std::max(most, std::fabs(weight.codebook[i]));
    const float unit = most > 0.0f ? static_cast<float>(kMostTableInteger) / most : 0.0f;
    alignas(64) int16_t table[32];
    for (int i = 0; i < 32; ++i)
      table[i] = static_cast<int16_t>(std::lrintf(weight.codebook[i % 16] * unit));
    return {block_shift, next_rows(weight), _mm512_load_si512(table),
            most * (kTableUnit / static_cast<float>(kMostTableInteger))};
  }

  // The 16-bit lanes whose low 4 bits are weight kWordWeights[e] of each word.
  template <Fetch kFetch>
  QLK_AVX512 static QLK_INLINE __m512i codes(const uint8_t* codes, int e, __m512i& word) {
    if constexpr (kFetch == Fetch::kByteLoads) {
      if (e % 2) return _mm512_srli_epi16(word, 4);
      word = _mm512_loadu_si512(codes + e / 2);
      keep_in_register(word);
      return word;
    }
    return e == 0 ? word : _mm512_srli_epi16(word, static_cast<unsigned>(4 * e));
  }

  QLK_AVX512 static QLK_INLINE __m512i look_up(__m512i codes, __m512i table) {
    return _mm512_permutexvar_epi16(codes, table);
  }

  // In assembly, because an intrinsic of a higher level cannot be part of templates of this one.
  QLK_AVX512 static QLK_INLINE Sum add(int e, __m512i value, __m512i factor, Sum sum) {
    if (e == 0) sum = _mm512_setzero_si512();
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(value), "v"(factor));
    return sum;
  }

  QLK_AVX512 static QLK_INLINE __m512 finish(Sum sum, const float* x) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(x + 16 * kLookUps));
  }
};

// Adds a group's products to sums[row][token]. Lanes outside the mask are not the row's: they hold
// code 0 against zeros of x, and the scale of another row, possibly NaN, must not reach them.
template <class Products, int kRows, int kCount, Fetch kFetch>
QLK_AVX512 QLK_INLINE void add_group(const Shape& shape, const Row* rows, const __m512i* blocks,
                                     int64_t group, const float* x, int64_t x_stride,
                                     __m512 (*sums)[kCount]) {
  x += group * group_floats(Products::kLayout);
  __m512i word[kRows];
  QLK_UNROLL
  for (int r = 0; r < kRows; ++r)
    if (kFetch == Fetch::kMasked)
      word[r] = masked_codes(rows[r].codes + group * kGroupBytes, rows[r].weights - group * kGroup);
  typename Products::Sum partial[kRows][kCount];
  QLK_UNROLL
  for (int e = 0; e < Products::kLookUps; ++e) {
    __m512i value[kRows];
    QLK_UNROLL
    for (int r = 0; r < kRows; ++r)
      value[r] = Products::look_up(
          Products::template codes<kFetch>(rows[r].codes + group * kGroupBytes, e, word[r]),
          shape.table);
    QLK_UNROLL
    for (int t = 0; t < kCount; ++t) {
      __m512i factor = _mm512_loadu_si512(x + t * x_stride + 16 * e);
      if (kRows > 1) keep_in_register(factor);
      QLK_UNROLL
      for (int r = 0; r < kRows; ++r)
        partial[r][t] = Products::add(e, value[r], factor, partial[r][t]);
    }
  }
  QLK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float* first =
        rows[r].scales + ((rows[r].block_phase + group * kGroup) >> shape.block_shift);
    __m512 scale = _mm512_permutexvar_ps(blocks[r], _mm512_loadu_ps(first));
    if (kFetch == Fetch::kMasked) {
      const int64_t weights = std::min(kGroup, rows[r].weights - group * kGroup);
      const int64_t lanes = (weights + kLaneWeights - 1) / kLaneWeights;
      scale = _mm512_maskz_mov_ps(_cvtu32_mask16((1u << lanes) - 1u), scale);
    }
    QLK_UNROLL
    for (int t = 0; t < kCount; ++t)
      sums[r][t] =
          _mm512_fmadd_ps(scale, Products::finish(partial[r][t], x + t * x_stride), sums[r][t]);
  }
}

// out[t * out_stride + r * kPairRows] = x[t] · rows[r] for kCount tokens and kRows rows of one
// phase. A (token, row) pair's additions have one order, whatever kRows and kCount are.
template <class Products, int kRows, int kCount, bool kFixedPhase>
QLK_AVX512 __attribute__((noinline)) void products(const Shape& shape, const Row* rows,
                                                   const float* x, int64_t x_stride,
                                                   int64_t out_stride, float* out) {
  __m512 sums[kRows][kCount];
  __m512i blocks[kRows];
  QLK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    QLK_UNROLL
    for (int t = 0; t < kCount; ++t) sums[r][t] = _mm512_setzero_ps();
    blocks[r] = lane_blocks(rows[r].block_phase, shape.block_shift);
  }
  const int64_t whole = kRows > 1 ? std::min(rows[0].whole, rows[1].whole) : rows[0].whole;
  int64_t group = 0;
  for (; group < whole; ++group) {
    QLK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const char* bytes = reinterpret_cast<const char*>(rows[r].codes) + group * kGroupBytes;
      _mm_prefetch(bytes + shape.next_rows, _MM_HINT_T1);
      _mm_prefetch(bytes + kNearPrefetch, _MM_HINT_T0);
      if constexpr (!kFixedPhase)
        blocks[r] = lane_blocks(rows[r].block_phase + group * kGroup, shape.block_shift);
    }
    add_group<Products, kRows, kCount, Fetch::kByteLoads>(shape, rows, blocks, group, x, x_stride,
                                                          sums);
  }
  for (; group * kGroup < rows[0].weights; ++group) {
    QLK_UNROLL
    for (int r = 0; r < kRows; ++r)
      blocks[r] = lane_blocks(rows[r].block_phase + group * kGroup, shape.block_shift);
    add_group<Products, kRows, kCount, Fetch::kMasked>(shape, rows, blocks, group, x, x_stride,
                                                       sums);
  }
  QLK_UNROLL
  for (int t = 0; t < kCount; ++t) {
    QLK_UNROLL
    for (int r = 0; r < kRows; ++r)
      out[t * out_stride + r * kPairRows] = shape.factor * _mm512_reduce_add_ps(sums[r][t]);
  }
}

template <class Products, int kRows, bool kFixedPhase>
QLK_AVX512 void products_of_tokens(const Shape& shape, const Row* rows, const float* x,
                                   int64_t tokens, int64_t x_stride, int64_t out_stride,
                                   float* out) {
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const float* first = x + t * x_stride;
    float* result = out + t * out_stride;
    switch (std::min(kTokens, tokens - t)) {
      case 1:
        products<Products, kRows, 1, kFixedPhase>(shape, rows, first, x_stride, out_stride, result);
        break;
      case 2:
        products<Products, kRows, 2, kFixedPhase>(shape, rows, first, x_stride, out_stride, result);
        break;
      case 3:
        products<Products, kRows, 3, kFixedPhase>(shape, rows, first, x_stride, out_stride, result);
        break;
      default:
        products<Products, kRows, kTokens, kFixedPhase>(shape, rows, first, x_stride, out_stride,
                                                        result);
    }
  }
}

template <class Products, bool kFixedPhase>
QLK_AVX512 void strip_avx512(const QuantizedView& weight, const float* x, int64_t tokens,
                             int64_t row_begin, int64_t rows, float* scales, int64_t out_stride,
                             float* out) {
  const int64_t K = weight.cols, x_row = interleaved_row(K, Products::kLayout);
  const int64_t x_stride = x_row * phase_count(K), row_scales = scales_of_row(weight);
  const Shape shape =
      Products::shape(weight, std::countr_zero(static_cast<uint64_t>(weight.block_size)));
  const int64_t weight_bytes = (weight.rows * K + 1) / 2;
  for (int64_t begin = 0; begin < rows; begin += kScaleRows) {
    const int64_t count = std::min(kScaleRows, rows - begin);
    Row batch[kScaleRows];
    const float* batch_x[kScaleRows];
    // Ahead of their use: a load that spans two stores would wait for them to leave the store
    // buffer.
    for (int64_t i = 0; i < count; ++i) {
      const int64_t flat = (row_begin + begin + i) * K, phase = flat % kLaneWeights;
      const int64_t first = flat - phase, block = first >> shape.block_shift;
      const int64_t lanes = (phase + K + kLaneWeights - 1) / kLaneWeights;
      const int64_t readable = (weight_bytes - first / 2 - kReadBeyond) / kGroupBytes;
      batch[i] = {weight.codes + first / 2, scales + i * row_scales,
                  first & (weight.block_size - 1), phase + K,
                  std::max<int64_t>(0, std::min(lanes / 16, readable))};
      batch_x[i] = x + phase_slot(phase, K) * x_row;
      decode_scales_avx512(weight.scales, block, ((flat + K - 1) >> shape.block_shift) - block + 1,
                           scales + i * row_scales);
    }
    for (int64_t i = 0; i < std::min(count, kPairRows); ++i) {
      const bool paired = i + kPairRows < count;
      const Row pair[2] = {batch[i], batch[paired ? i + kPairRows : i]};
      const auto run = paired ? products_of_tokens<Products, 2, kFixedPhase>
                              : products_of_tokens<Products, 1, kFixedPhase>;
      run(shape, pair, batch_x[i], tokens, x_stride, out_stride, out + begin + i);
    }
  }
}

}  // namespace

void strip_interleaved(const QuantizedView& weight, XLayout layout, const float* x, int64_t tokens,
                       int64_t row_begin, int64_t rows, float* scales, int64_t out_stride,
                       float* out) {
  // A group that is a whole number of blocks finds each one in the same phase.
  const bool fixed = kGroup % weight.block_size == 0;
  const auto strip =
      layout == XLayout::kInteger
          ? (fixed ? strip_avx512<IntegerProducts, true> : strip_avx512<IntegerProducts, false>)
          : (fixed ? strip_avx512<FloatProducts, true> : strip_avx512<FloatProducts, false>);
  strip(weight, x, tokens, row_begin, rows, scales, out_stride, out);
}

#else

void strip_interleaved(const QuantizedView&, XLayout, const float*, int64_t, int64_t, int64_t,
                       float*, int64_t, float*) {}

#endif

}  // namespace qlk
