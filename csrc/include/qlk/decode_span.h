// Decodes a run of consecutive weights to fp32 or bf16 in their natural order, whatever the run's
// start and length: blocks may straddle its ends, and its first element may be a low nibble.
#pragma once

#include <algorithm>

#include "qlk/decode_scales.h"
#include "qlk/float16.h"
#include "qlk/isa.h"
#include "qlk/types.h"

namespace qlk {

// Elements that one table (codebook times the block's scale) decodes.
constexpr int64_t kTableSize = 16;

QLK_INLINE int code_at(const uint8_t* codes, int64_t element) {
  const uint8_t byte = codes[element >> 1];
  return element & 1 ? byte & 15 : byte >> 4;
}

// Walks the parts of [begin, begin + count) that lie in one block each; scales[0] belongs to the
// block that holds `begin`.
class BlockRun {
 public:
  QLK_INLINE BlockRun(int64_t begin, int64_t count, int64_t block_size, const float* scales)
      : position_(begin), end_(begin + count), block_size_(block_size), scales_(scales) {
    measure();
  }
  QLK_INLINE bool valid() const { return position_ < end_; }
  QLK_INLINE int64_t begin() const { return position_; }
  QLK_INLINE int64_t length() const { return length_; }
  QLK_INLINE float scale() const { return *scales_; }
  QLK_INLINE void advance() {
    position_ += length_;
    ++scales_;
    measure();
  }

 private:
  QLK_INLINE void measure() {
    length_ = std::min(end_ - position_, block_size_ - (position_ & (block_size_ - 1)));
  }

  int64_t position_, end_, block_size_, length_ = 0;
  const float* scales_;
};

QLK_INLINE void decode_block_portable(const uint8_t* codes, int64_t begin, int64_t count,
                                      const float* codebook, float scale, float* out) {
  float table[kTableSize];
  for (int i = 0; i < kTableSize; ++i) table[i] = codebook[i] * scale;
  for (int64_t i = 0; i < count; ++i) out[i] = table[code_at(codes, begin + i)];
}

#if defined(QLK_X86)

// The shift that brings nibble i of a little-endian 32-bit load (element 2i in the high nibble of
// byte i) to the bottom.
alignas(64) inline constexpr int32_t kNibbleShifts[16] = {4, 0, 12, 8, 20, 16, 28, 24,
                                                          4, 0, 12, 8, 20, 16, 28, 24};

QLK_AVX2 QLK_INLINE void decode_block_avx2(const uint8_t* codes, int64_t begin, int64_t count,
                                           const float* codebook, float scale, float* out) {
  const __m256 scales = _mm256_set1_ps(scale);
  const __m256 low_half = _mm256_mul_ps(_mm256_loadu_ps(codebook), scales);
  const __m256 high_half = _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scales);
  int64_t i = 0;
  if (begin & 1) out[i++] = codebook[code_at(codes, begin)] * scale;
  const __m256i shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(kNibbleShifts));
  for (; i + 8 <= count; i += 8) {
    int32_t packed;
    std::memcpy(&packed, codes + ((begin + i) >> 1), sizeof packed);
    const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(packed), shifts);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_half, code),
                                               _mm256_permutevar8x32_ps(high_half, code), upper));
  }
  for (; i < count; ++i) out[i] = codebook[code_at(codes, begin + i)] * scale;
}

QLK_AVX512 QLK_INLINE void decode_block_avx512(const uint8_t* codes, int64_t begin, int64_t count,
                                               const float* codebook, float scale, float* out) {
  const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
  const __m512i shifts = _mm512_load_si512(kNibbleShifts);
  int64_t i = 0;
  if (begin & 1) out[i++] = codebook[code_at(codes, begin)] * scale;
  for (; i < count; i += 16) {
    const int64_t left = count - i;
    const __mmask16 mask = _cvtu32_mask16(left >= 16 ? 0xffffu : (1u << left) - 1u);
    const __m128i bytes = _mm_maskz_loadu_epi8(
        _cvtu32_mask16((1u << (left >= 16 ? 8 : (left + 1) / 2)) - 1u), codes + ((begin + i) >> 1));
    const __m512i spread =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                 _mm512_castsi128_si512(bytes));
    const __m512i code = _mm512_srlv_epi32(spread, shifts);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_permutexvar_ps(code, table));
  }
}

// The block's values rounded to bf16, once in each half: bit 4 of a vpermw index is then
// irrelevant.
QLK_AVX512_BF16 QLK_INLINE __m512i bf16_table(__m512 codebook, float scale) {
  const __m512 values = _mm512_mul_ps(codebook, _mm512_set1_ps(scale));
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values, values));
}

// vpmultishiftqb control that puts nibble i of a quadword (element order) at the bottom of word i,
// for the words 4 * quarter ... 4 * quarter + 3.
constexpr uint64_t nibble_offsets(int quarter) {
  uint64_t control = 0;
  for (int i = 0; i < 4; ++i) {
    const int nibble = 4 * quarter + i;
    const uint64_t bit = static_cast<uint64_t>(8 * (nibble / 2) + (nibble % 2 ? 0 : 4));
    control |= (bit | (bit << 8)) << (16 * i);
  }
  return control;
}

// 32 weights from 16 bytes, in natural order, as indices for bf16_table.
QLK_AVX512_BF16 QLK_INLINE __m512i code_words(const uint8_t* bytes) {
  const __m512i control =
      _mm512_setr_epi64(nibble_offsets(0), nibble_offsets(1), nibble_offsets(2), nibble_offsets(3),
                        nibble_offsets(0), nibble_offsets(1), nibble_offsets(2), nibble_offsets(3));
  int64_t low, high;
  std::memcpy(&low, bytes, sizeof low);
  std::memcpy(&high, bytes + 8, sizeof high);
  const __m512i spread = _mm512_mask_set1_epi64(_mm512_set1_epi64(low), 0xf0, high);
  return _mm512_multishift_epi64_epi8(control, spread);
}

QLK_AVX512_BF16 QLK_INLINE void decode_block_bf16(const uint8_t* codes, int64_t begin,
                                                  int64_t count, __m512 codebook, float scale,
                                                  uint16_t* out) {
  const __m512i table = bf16_table(codebook, scale);
  int64_t i = 0;
  alignas(64) uint16_t values[2 * kTableSize];
  if (begin & 1) {
    _mm512_store_si512(values, table);
    out[i++] = values[code_at(codes, begin)];
  }
  for (; i + 32 <= count; i += 32) {
    const __m512i words = code_words(codes + ((begin + i) >> 1));
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(words, table));
  }
  if (i == count) return;
  _mm512_store_si512(values, table);
  for (; i < count; ++i) out[i] = values[code_at(codes, begin + i)];
}

#endif

// Decodes `count` weights from flat index `begin` into out (float for decode_span_f32, bf16 words
// for decode_span_bf16), at the given level or the next lower one that has code.
void decode_span_f32(const QuantizedView& weight, int64_t begin, int64_t count, Isa isa,
                     float* out);
void decode_span_bf16(const QuantizedView& weight, int64_t begin, int64_t count, Isa isa,
                      uint16_t* out);

}  // namespace qlk
