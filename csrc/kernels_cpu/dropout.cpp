// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): key = the
// seed's halves, counter = the halves of element / 4, and word element % 4 of the output.
#include "qlk/dropout.h"

#include <algorithm>

#include "qlk/convert.h"
#include "qlk/float16.h"
#include "qlk/isa.h"

namespace qlk {
namespace {

constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
constexpr uint32_t kKeyStep0 = 0x9e3779b9u, kKeyStep1 = 0xbb67ae85u;
constexpr int kRounds = 10;
// Counters computed side by side: the compiler maps them to vector lanes.
constexpr int64_t kLanes = 16;
constexpr int64_t kWords = 4 * kLanes;

// words[4 * lane + w] of counters first ... first + kLanes - 1.
QLK_INLINE void philox_words(uint64_t seed, uint64_t first, uint32_t* words) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(counter);
    c1[i] = static_cast<uint32_t>(counter >> 32);
    c2[i] = c3[i] = 0;
  }
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t product0 = uint64_t{kMultiplier0} * c0[i];
      const uint64_t product1 = uint64_t{kMultiplier1} * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(product1);
      c3[i] = static_cast<uint32_t>(product0);
    }
    k0 += kKeyStep0;
    k1 += kKeyStep1;
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

QLK_INLINE void factors_of(const DropoutMask& mask, int64_t begin, int64_t count, float* factors) {
  int64_t done = 0;
  while (done < count) {
    const int64_t element = begin + done, skip = element & 3;
    uint32_t words[kWords];
    philox_words(mask.seed, static_cast<uint64_t>(element >> 2), words);
    const int64_t part = std::min(count - done, kWords - skip);
    for (int64_t i = 0; i < part; ++i)
      factors[done + i] = words[skip + i] >= mask.threshold ? mask.keep_scale : 0.0f;
    done += part;
  }
}

void factors_portable(const DropoutMask& mask, int64_t begin, int64_t count, float* factors) {
  factors_of(mask, begin, count, factors);
}

#if defined(QLK_X86)

QLK_AVX2 void factors_avx2(const DropoutMask& mask, int64_t begin, int64_t count, float* factors) {
  factors_of(mask, begin, count, factors);
}

// High and low halves of the 16 products of 32 bits.
struct Halves {
  __m512i high, low;
};

QLK_AVX512 QLK_INLINE Halves multiply_u32(__m512i a, __m512i b) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  return {_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB),
          _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA)};
}

// philox_words, a counter a lane: words[j] holds counters first + 4j ... first + 4j + 3.
QLK_AVX512 QLK_INLINE void philox_words_avx512(uint64_t seed, uint64_t first, __m512i* words) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i start = _mm512_set1_epi32(static_cast<int>(first));
  __m512i c0 = _mm512_add_epi32(start, lane);
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(first >> 32));
  c1 = _mm512_mask_add_epi32(c1, _mm512_cmplt_epu32_mask(c0, start), c1, _mm512_set1_epi32(1));
  __m512i c2 = _mm512_setzero_si512(), c3 = _mm512_setzero_si512();
  const __m512i multiplier0 = _mm512_set1_epi32(static_cast<int>(kMultiplier0));
  const __m512i multiplier1 = _mm512_set1_epi32(static_cast<int>(kMultiplier1));
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  constexpr int kXor3 = 0x96;
  for (int round = 0; round < kRounds; ++round) {
    const Halves product0 = multiply_u32(c0, multiplier0), product1 = multiply_u32(c2, multiplier1);
    const __m512i key0 = _mm512_set1_epi32(static_cast<int>(k0));
    const __m512i key1 = _mm512_set1_epi32(static_cast<int>(k1));
    c0 = _mm512_ternarylogic_epi32(product1.high, c1, key0, kXor3);
    c2 = _mm512_ternarylogic_epi32(product0.high, c3, key1, kXor3);
    c1 = product1.low;
    c3 = product0.low;
    k0 += kKeyStep0;
    k1 += kKeyStep1;
  }
  // A 4 x 4 transposition within 128 bits, then one of the 128-bit parts.
  const __m512i low01 = _mm512_unpacklo_epi32(c0, c1), high01 = _mm512_unpackhi_epi32(c0, c1);
  const __m512i low23 = _mm512_unpacklo_epi32(c2, c3), high23 = _mm512_unpackhi_epi32(c2, c3);
  const __m512i r0 = _mm512_unpacklo_epi64(low01, low23), r1 = _mm512_unpackhi_epi64(low01, low23);
  const __m512i r2 = _mm512_unpacklo_epi64(high01, high23);
  const __m512i r3 = _mm512_unpackhi_epi64(high01, high23);
  const __m512i first01 = _mm512_shuffle_i32x4(r0, r1, 0x44),
                last01 = _mm512_shuffle_i32x4(r0, r1, 0xee);
  const __m512i first23 = _mm512_shuffle_i32x4(r2, r3, 0x44),
                last23 = _mm512_shuffle_i32x4(r2, r3, 0xee);
  words[0] = _mm512_shuffle_i32x4(first01, first23, 0x88);
  words[1] = _mm512_shuffle_i32x4(first01, first23, 0xdd);
  words[2] = _mm512_shuffle_i32x4(last01, last23, 0x88);
  words[3] = _mm512_shuffle_i32x4(last01, last23, 0xdd);
}

QLK_AVX512 void factors_avx512(const DropoutMask& mask, int64_t begin, int64_t count,
                               float* factors) {
  const bool none = mask.threshold >> 32 != 0;
  const __m512i threshold = _mm512_set1_epi32(static_cast<int>(mask.threshold));
  const __m512 scale = _mm512_set1_ps(mask.keep_scale);
  alignas(64) float buffer[kWords];
  for (int64_t done = 0; done < count;) {
    const int64_t element = begin + done, skip = element & 3;
    const int64_t part = std::min(count - done, kWords - skip);
    float* out = part == kWords ? factors + done : buffer;
    __m512i words[4];
    philox_words_avx512(mask.seed, static_cast<uint64_t>(element >> 2), words);
    QLK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __mmask16 kept = none ? __mmask16{0} : _mm512_cmpge_epu32_mask(words[j], threshold);
      _mm512_storeu_ps(out + 16 * j, _mm512_maskz_mov_ps(kept, scale));
    }
    if (out == buffer) std::copy_n(buffer + skip, part, factors + done);
    done += part;
  }
}

QLK_AVX512 void apply_avx512(const float* factors, int64_t count, float* values) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = _cvtu32_mask16(count - i >= 16 ? 0xffffu : (1u << (count - i)) - 1u);
    const __m512 factor = _mm512_maskz_loadu_ps(mask, factors + i);
    const __mmask16 kept = _mm512_cmp_ps_mask(factor, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    const __m512 value = _mm512_maskz_loadu_ps(mask, values + i);
    _mm512_mask_storeu_ps(values + i, mask, _mm512_maskz_mul_ps(kept, value, factor));
  }
}

#endif

// Zero where the factor is, whatever the value, else their product.
void apply_factors(const float* factors, int64_t count, Isa isa, float* values) {
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512) return apply_avx512(factors, count, values);
#endif
  for (int64_t i = 0; i < count; ++i)
    values[i] = factors[i] != 0.0f ? values[i] * factors[i] : 0.0f;
}

}  // namespace

void dropout_factors(const DropoutMask& mask, int64_t begin, int64_t count, Isa isa,
                     float* factors) {
  // The threshold of p = 1, 2^32, is above every word, and its 1 / (1 - p) is infinite.
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512) return factors_avx512(mask, begin, count, factors);
  if (isa == Isa::kAvx2) return factors_avx2(mask, begin, count, factors);
#endif
  factors_portable(mask, begin, count, factors);
}

void dropout(const DropoutMask& mask, const void* x, DType dtype, int64_t numel, Isa isa,
             const ThreadPool& pool, void* out) {
  constexpr int64_t kPiece = 1024;
  pool.run(0, (numel + kPiece - 1) / kPiece, 8, [&](int64_t first, int64_t last) {
    float values[kPiece], factors[kPiece];
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * kPiece, count = std::min(kPiece, numel - begin);
      load_f32(x, dtype, begin, count, isa, values);
      dropout_factors(mask, begin, count, isa, factors);
      apply_factors(factors, count, isa, values);
      store_f32(values, count, dtype, isa, element_at(out, dtype, begin));
    }
  });
}

}  // namespace qlk
