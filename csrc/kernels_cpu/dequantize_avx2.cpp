// The AVX2 path of dequantize: per block the 16 rounded products, looked up by pshufb (16-bit
// outputs, low and high bytes apart) or vpermps (fp32, two halves and a blend).
#include "dequantize_path.h"
#include "qlk/isa.h"
#include "qlk/simd_avx2.h"

#if defined(QLK_X86)

namespace qlk {
namespace {

QLK_AVX2 void decode_scales_avx2(const ScalesView& view, int64_t first, int64_t count,
                                 float* scales) {
  if (!view.nested()) return decode_scales_portable(view, first, count, scales);
  const __m256 offset = _mm256_set1_ps(*view.scale_offset);
  int64_t i = 0;
  while (i < count) {
    const int64_t second = (first + i) / view.scale_block_size;
    const int64_t left = (second + 1) * view.scale_block_size - (first + i);
    const int64_t stop = i + (left < count - i ? left : count - i);
    const __m256 scale = _mm256_set1_ps(view.scale_absmax[second]);
    for (; i + 8 <= stop; i += 8) {
      const __m128i bytes =
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(view.scale_codes + first + i));
      const __m256 value = _mm256_i32gather_ps(view.scale_codebook, _mm256_cvtepu8_epi32(bytes), 4);
      _mm256_storeu_ps(scales + i, _mm256_add_ps(_mm256_mul_ps(value, scale), offset));
    }
    for (; i < stop; ++i) scales[i] = decode_nested_scale(view, first + i);
  }
}

template <bool kStreaming>
QLK_AVX2 QLK_INLINE void store(void* out, __m256i value) {
  if constexpr (kStreaming)
    _mm256_stream_si256(static_cast<__m256i*>(out), value);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(out), value);
}

// 16-bit outputs: 16 bytes of codes to 32 words.
template <class Scalar, bool kStreaming>
QLK_AVX2 void decode_words(const uint8_t* codes, const float* scales, int64_t n_blocks,
                           int64_t block_size, const float* codebook, uint16_t* out) {
  const __m256 values_low = _mm256_loadu_ps(codebook), values_high = _mm256_loadu_ps(codebook + 8);
  const __m128i even_bytes = _mm_set1_epi16(0x00ff);
  for (int64_t b = 0; b < n_blocks; ++b) {
    const __m256 scale = _mm256_set1_ps(scales[b]);
    const __m128i words_low = avx2::to_half_words<Scalar>(_mm256_mul_ps(values_low, scale));
    const __m128i words_high = avx2::to_half_words<Scalar>(_mm256_mul_ps(values_high, scale));
    const __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_packus_epi16(
        _mm_and_si128(words_low, even_bytes), _mm_and_si128(words_high, even_bytes)));
    const __m256i high_bytes = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_srli_epi16(words_low, 8), _mm_srli_epi16(words_high, 8)));
    for (int64_t i = 0; i < block_size; i += 32, codes += 16, out += 32) {
      const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      const __m128i nibble = _mm_set1_epi8(0x0f);
      const __m128i even = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
      const __m128i odd = _mm_and_si128(pairs, nibble);
      const __m256i index =
          _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
      const __m256i low = _mm256_shuffle_epi8(low_bytes, index);
      const __m256i high = _mm256_shuffle_epi8(high_bytes, index);
      // Unpacking works within 128-bit lanes: elements 0-7 and 16-23, then 8-15 and 24-31.
      const __m256i outer = _mm256_unpacklo_epi8(low, high);
      const __m256i inner = _mm256_unpackhi_epi8(low, high);
      store<kStreaming>(out, _mm256_permute2x128_si256(outer, inner, 0x20));
      store<kStreaming>(out + 16, _mm256_permute2x128_si256(outer, inner, 0x31));
    }
  }
}

// fp32 outputs: 4 bytes of codes to 8 lanes.
template <bool kStreaming>
QLK_AVX2 void decode_floats(const uint8_t* codes, const float* scales, int64_t n_blocks,
                            int64_t block_size, const float* codebook, float* out) {
  const __m256 values_low = _mm256_loadu_ps(codebook), values_high = _mm256_loadu_ps(codebook + 8);
  for (int64_t b = 0; b < n_blocks; ++b) {
    const __m256 scale = _mm256_set1_ps(scales[b]);
    const __m256 table_low = _mm256_mul_ps(values_low, scale);
    const __m256 table_high = _mm256_mul_ps(values_high, scale);
    for (int64_t i = 0; i < block_size; i += 8, codes += 4, out += 8) {
      int32_t quad;
      __builtin_memcpy(&quad, codes, sizeof quad);
      const __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(quad));
      const __m256i index =
          _mm256_or_si256(_mm256_srli_epi64(pairs, 4), _mm256_slli_epi64(pairs, 32));
      // vpermps reads three bits of the index; the fourth, moved to the sign, picks the half.
      const __m256 low = _mm256_permutevar8x32_ps(table_low, index);
      const __m256 high = _mm256_permutevar8x32_ps(table_high, index);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      store<kStreaming>(out, _mm256_castps_si256(_mm256_blendv_ps(low, high, upper)));
    }
  }
}

template <class Scalar, bool kStreaming>
QLK_AVX2 QLK_INLINE void decode_run(const uint8_t* codes, const float* scales, int64_t n_blocks,
                                    int64_t block_size, const float* codebook, void* out) {
  if constexpr (Scalar::kDType == DType::kFloat32)
    decode_floats<kStreaming>(codes, scales, n_blocks, block_size, codebook,
                              static_cast<float*>(out));
  else
    decode_words<Scalar, kStreaming>(codes, scales, n_blocks, block_size, codebook,
                                     static_cast<uint16_t*>(out));
}

template <class Scalar>
QLK_AVX2 void decode_blocks_avx2(const uint8_t* codes, const float* scales, int64_t n_blocks,
                                 int64_t block_size, const float* codebook, bool streaming,
                                 void* out) {
  if (streaming) {
    decode_run<Scalar, true>(codes, scales, n_blocks, block_size, codebook, out);
    // Non-temporal stores become visible to other threads only after a fence.
    _mm_sfence();
  } else {
    decode_run<Scalar, false>(codes, scales, n_blocks, block_size, codebook, out);
  }
}

template <class Scalar>
constexpr DequantizePath kAvx2Path = {decode_scales_avx2, decode_blocks_avx2<Scalar>};

}  // namespace

DequantizePath dequantize_path_avx2(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return kAvx2Path<Float16>;
    case DType::kBFloat16:
      return kAvx2Path<BFloat16>;
    default:
      return kAvx2Path<Float32>;
  }
}

}  // namespace qlk

#endif
