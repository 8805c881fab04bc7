// AVX-512 loads and stores of the storage types as 16 fp32 lanes.
#pragma once

#include "qlk/float16.h"
#include "qlk/isa.h"

#if defined(QLK_X86)

namespace qlk::avx512 {

template <class Scalar>
QLK_AVX512 QLK_INLINE __m512 load16(const typename Scalar::Storage* source) {
  if constexpr (Scalar::kDType == DType::kFloat32) {
    return _mm512_loadu_ps(source);
  } else {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    if constexpr (Scalar::kDType == DType::kFloat16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
}

// Round to nearest even by integer arithmetic: vcvtneps2bf16 flushes denormals.
QLK_AVX512 QLK_INLINE __m256i to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
}

// The 16 lanes as float16 or bfloat16.
template <class Scalar>
QLK_AVX512 QLK_INLINE __m256i to_half_words(__m512 value) {
  static_assert(sizeof(typename Scalar::Storage) == 2);
  if constexpr (Scalar::kDType == DType::kFloat16)
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return to_bf16(value);
}

}  // namespace qlk::avx512

#endif
