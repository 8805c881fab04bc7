// AVX2 loads and stores of the storage types as 8 fp32 lanes.
#pragma once

#include "qlk/float16.h"
#include "qlk/isa.h"

#if defined(QLK_X86)

namespace qlk::avx2 {

template <class Scalar>
QLK_AVX2 QLK_INLINE __m256 load8(const typename Scalar::Storage* source) {
  if constexpr (Scalar::kDType == DType::kFloat32) {
    return _mm256_loadu_ps(source);
  } else {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    if constexpr (Scalar::kDType == DType::kFloat16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
}

// 8 words from 8 dwords that fit them.
QLK_AVX2 QLK_INLINE __m128i narrow(__m256i dwords) {
  return _mm_packus_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
}

// Round to nearest even, NaN quieted.
QLK_AVX2 QLK_INLINE __m128i to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return narrow(_mm256_blendv_epi8(rounded, quiet, nan));
}

// The 8 lanes as float16 or bfloat16.
template <class Scalar>
QLK_AVX2 QLK_INLINE __m128i to_half_words(__m256 value) {
  static_assert(sizeof(typename Scalar::Storage) == 2);
  if constexpr (Scalar::kDType == DType::kFloat16)
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return to_bf16(value);
}

}  // namespace qlk::avx2

#endif
