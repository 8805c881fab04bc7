// The AVX2 and AVX-512 paths of double_quantize: a binary search of 8 steps, gathers where the
// candidates of a step no longer fit one register.
#include "double_quantize_path.h"
#include "qlk/isa.h"

#if defined(QLK_X86)

namespace qlk {
namespace {

QLK_AVX512 QLK_INLINE __m512i search16(__m512 n, const float* midpoints, __m512 coarse) {
  // Ranks in units of 16 first: coarse[i] = midpoints[16 * i + 15].
  __m512i rank = _mm512_setzero_si512();
  for (int step = 8; step != 0; step >>= 1) {
    const __m512i probe = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
    const __m512 limit = _mm512_permutexvar_ps(probe, coarse);
    const __mmask16 above = _mm512_cmp_ps_mask(limit, n, _CMP_NGE_UQ);
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
  }
  rank = _mm512_slli_epi32(rank, 4);
  for (int step = 8; step != 0; step >>= 1) {
    const __m512i probe = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
    const __m512 limit = _mm512_i32gather_ps(probe, midpoints, 4);
    const __mmask16 above = _mm512_cmp_ps_mask(limit, n, _CMP_NGE_UQ);
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
  }
  return rank;
}

QLK_AVX2 QLK_INLINE __m256i search8(__m256 n, const float* midpoints) {
  __m256i rank = _mm256_setzero_si256();
  for (int step = 128; step != 0; step >>= 1) {
    const __m256i probe = _mm256_add_epi32(rank, _mm256_set1_epi32(step - 1));
    const __m256 limit = _mm256_i32gather_ps(midpoints, probe, 4);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(limit, n, _CMP_NGE_UQ));
    rank = _mm256_add_epi32(rank, _mm256_and_si256(above, _mm256_set1_epi32(step)));
  }
  return rank;
}

}  // namespace

QLK_AVX512 void encode_scales_avx512(const float* absmax, int64_t count, float offset,
                                     float inverse, const float* midpoints, uint8_t* codes) {
  const __m512i every16 =
      _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
  const __m512 coarse =
      _mm512_i32gather_ps(_mm512_add_epi32(every16, _mm512_set1_epi32(15)), midpoints, 4);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 valid =
        static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    const __m512 a = _mm512_maskz_loadu_ps(valid, absmax + i);
    const __m512 n =
        _mm512_mul_ps(_mm512_sub_ps(a, _mm512_set1_ps(offset)), _mm512_set1_ps(inverse));
    _mm512_mask_cvtepi32_storeu_epi8(codes + i, valid, search16(n, midpoints, coarse));
  }
}

QLK_AVX2 void encode_scales_avx2(const float* absmax, int64_t count, float offset, float inverse,
                                 const float* midpoints, uint8_t* codes) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 a = _mm256_loadu_ps(absmax + i);
    const __m256 n =
        _mm256_mul_ps(_mm256_sub_ps(a, _mm256_set1_ps(offset)), _mm256_set1_ps(inverse));
    const __m256i rank = search8(n, midpoints);
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(rank), _mm256_extracti128_si256(rank, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packus_epi16(words, words));
  }
  encode_scales_portable(absmax + i, count - i, offset, inverse, midpoints, codes + i);
}

}  // namespace qlk

#endif
