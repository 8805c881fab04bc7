// The AVX-512-BF16 path of dequantize, 16-bit outputs: VBMI spreads the codes in one instruction
// and vcvtneps2bf16 rounds the table in another.
#include <cmath>

#include "dequantize_path.h"
#include "qlk/isa.h"
#include "qlk/simd_avx512.h"

#if defined(QLK_X86)

namespace qlk {
namespace {

// vcvtneps2bf16 flushes denormals: only scales from here on leave every product zero or normal.
float smallest_safe_scale(const float* codebook) {
  float smallest = 1.0f;
  for (int c = 0; c < 16; ++c) {
    const float magnitude = std::fabs(codebook[c]);
    if (magnitude > 0 && magnitude < smallest) smallest = magnitude;
  }
  // Twice the smallest normal leaves room for the rounding of the quotient; where it overflows, no
  // scale is safe.
  return 0x1p-125f / smallest;
}

template <class Scalar>
QLK_AVX512_BF16 QLK_INLINE __m256i round_table(__m512 products, bool safe) {
  if constexpr (Scalar::kDType == DType::kBFloat16) {
    if (safe) {
      const __m256bh words = _mm512_cvtneps_pbh(products);
      __m256i bits;
      __builtin_memcpy(&bits, &words, sizeof bits);
      return bits;
    }
  }
  return avx512::to_half_words<Scalar>(products);
}

template <class Scalar, bool kStreaming>
QLK_AVX512_BF16 void decode_words(const uint8_t* codes, const float* scales, int64_t n_blocks,
                                  int64_t block_size, const float* codebook, uint16_t* out) {
  const __m512 values = _mm512_loadu_ps(codebook);
  const float safe_scale = smallest_safe_scale(codebook);
  // Bit offsets within a quadword of 16 codes: word j takes the four bits of element j and four
  // more, of which the index reads one, to choose between equal halves of the table. Odd bytes:
  // any.
  const __m512i shifts = _mm512_setr_epi64(
      0x0008'000c'0000'0004, 0x0018'001c'0010'0014, 0x0028'002c'0020'0024, 0x0038'003c'0030'0034,
      0x0008'000c'0000'0004, 0x0018'001c'0010'0014, 0x0028'002c'0020'0024, 0x0038'003c'0030'0034);
  for (int64_t b = 0; b < n_blocks; ++b) {
    const __m512 products = _mm512_mul_ps(values, _mm512_set1_ps(scales[b]));
    const bool safe = std::fabs(scales[b]) >= safe_scale;
    const __m512i table = _mm512_broadcast_i64x4(round_table<Scalar>(products, safe));
    for (int64_t i = 0; i < block_size; i += 32, codes += 16, out += 32) {
      int64_t first, second;
      __builtin_memcpy(&first, codes, 8);
      __builtin_memcpy(&second, codes + 8, 8);
      const __m512i spread =
          _mm512_mask_set1_epi64(_mm512_set1_epi64(first), __mmask8{0xf0}, second);
      const __m512i index = _mm512_multishift_epi64_epi8(shifts, spread);
      const __m512i words = _mm512_permutexvar_epi16(index, table);
      if constexpr (kStreaming)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out), words);
      else
        _mm512_storeu_si512(out, words);
    }
  }
}

template <class Scalar>
QLK_AVX512_BF16 void decode_blocks(const uint8_t* codes, const float* scales, int64_t n_blocks,
                                   int64_t block_size, const float* codebook, bool streaming,
                                   void* out) {
  auto* words = static_cast<uint16_t*>(out);
  if (streaming) {
    decode_words<Scalar, true>(codes, scales, n_blocks, block_size, codebook, words);
    // Non-temporal stores become visible to other threads only after a fence.
    _mm_sfence();
  } else {
    decode_words<Scalar, false>(codes, scales, n_blocks, block_size, codebook, words);
  }
}

}  // namespace

DequantizePath dequantize_path_avx512_bf16(DType dtype) {
  DequantizePath path = dequantize_path_avx512(dtype);
  if (dtype == DType::kFloat16) path.decode_blocks = decode_blocks<Float16>;
  if (dtype == DType::kBFloat16) path.decode_blocks = decode_blocks<BFloat16>;
  return path;
}

}  // namespace qlk

#endif
