// The AVX-512 path of dequantize: per block a register with the 16 rounded products, then one
// permute per register of output. Codes are spread so that every lane holds its own low bits in
// place; what is above the four bits of the index selects between equal copies of the table.
#include "dequantize_path.h"
#include "qlk/isa.h"
#include "qlk/simd_avx512.h"

#if defined(QLK_X86)

namespace qlk {
namespace {

QLK_AVX512 void decode_scales_avx512(const ScalesView& view, int64_t first, int64_t count,
                                     float* scales) {
  if (!view.nested()) return decode_scales_portable(view, first, count, scales);
  const __m512 offset = _mm512_set1_ps(*view.scale_offset);
  int64_t i = 0;
  while (i < count) {
    // The run that shares one second-level scale.
    const int64_t second = (first + i) / view.scale_block_size;
    const int64_t left = (second + 1) * view.scale_block_size - (first + i);
    const int64_t stop = i + (left < count - i ? left : count - i);
    const __m512 scale = _mm512_set1_ps(view.scale_absmax[second]);
    for (; i < stop; i += 16) {
      const __mmask16 valid =
          static_cast<__mmask16>(stop - i >= 16 ? 0xffff : (1 << (stop - i)) - 1);
      const __m128i bytes = _mm_maskz_loadu_epi8(valid, view.scale_codes + first + i);
      const __m512 value = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), view.scale_codebook, 4);
      _mm512_mask_storeu_ps(scales + i, valid, _mm512_add_ps(_mm512_mul_ps(value, scale), offset));
    }
    i = stop;
  }
}

template <bool kStreaming>
QLK_AVX512 QLK_INLINE void store(void* out, __m512i value) {
  if constexpr (kStreaming)
    _mm512_stream_si512(static_cast<__m512i*>(out), value);
  else
    _mm512_storeu_si512(out, value);
}

// 16-bit outputs: 16 bytes of codes to 32 words, in order.
template <class Scalar, bool kStreaming>
QLK_AVX512 void decode_words(const uint8_t* codes, const float* scales, int64_t n_blocks,
                             int64_t block_size, __m512 codebook, uint16_t* out) {
  for (int64_t b = 0; b < n_blocks; ++b) {
    const __m512 products = _mm512_mul_ps(codebook, _mm512_set1_ps(scales[b]));
    const __m512i table = _mm512_broadcast_i64x4(avx512::to_half_words<Scalar>(products));
    for (int64_t i = 0; i < block_size; i += 32, codes += 16, out += 32) {
      const __m512i pairs =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      const __m512i index =
          _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16));
      store<kStreaming>(out, _mm512_permutexvar_epi16(index, table));
    }
  }
}

// fp32 outputs: 8 bytes of codes to 16 lanes, in order.
template <bool kStreaming>
QLK_AVX512 void decode_floats(const uint8_t* codes, const float* scales, int64_t n_blocks,
                              int64_t block_size, __m512 codebook, float* out) {
  for (int64_t b = 0; b < n_blocks; ++b) {
    const __m512i table = _mm512_castps_si512(_mm512_mul_ps(codebook, _mm512_set1_ps(scales[b])));
    for (int64_t i = 0; i < block_size; i += 16, codes += 8, out += 16) {
      const __m512i pairs =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
      const __m512i index =
          _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32));
      store<kStreaming>(out, _mm512_permutexvar_epi32(index, table));
    }
  }
}

template <class Scalar, bool kStreaming>
QLK_AVX512 QLK_INLINE void decode_run(const uint8_t* codes, const float* scales, int64_t n_blocks,
                                      int64_t block_size, __m512 codebook, void* out) {
  if constexpr (Scalar::kDType == DType::kFloat32)
    decode_floats<kStreaming>(codes, scales, n_blocks, block_size, codebook,
                              static_cast<float*>(out));
  else
    decode_words<Scalar, kStreaming>(codes, scales, n_blocks, block_size, codebook,
                                     static_cast<uint16_t*>(out));
}

template <class Scalar>
QLK_AVX512 void decode_blocks_avx512(const uint8_t* codes, const float* scales, int64_t n_blocks,
                                     int64_t block_size, const float* codebook, bool streaming,
                                     void* out) {
  const __m512 values = _mm512_loadu_ps(codebook);
  if (streaming) {
    decode_run<Scalar, true>(codes, scales, n_blocks, block_size, values, out);
    // Non-temporal stores become visible to other threads only after a fence.
    _mm_sfence();
  } else {
    decode_run<Scalar, false>(codes, scales, n_blocks, block_size, values, out);
  }
}

template <class Scalar>
constexpr DequantizePath kAvx512Path = {decode_scales_avx512, decode_blocks_avx512<Scalar>};

}  // namespace

DequantizePath dequantize_path_avx512(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return kAvx512Path<Float16>;
    case DType::kBFloat16:
      return kAvx512Path<BFloat16>;
    default:
      return kAvx512Path<Float32>;
  }
}

}  // namespace qlk

#endif
