// The AVX-512 path of quantize: a 16-lane tree search by vpermps, 64 codes packed at a time.
#include "qlk/isa.h"
#include "qlk/simd_avx512.h"
#include "quantize_path.h"

#if defined(QLK_X86)

namespace qlk {
namespace {

QLK_AVX512 QLK_INLINE uint32_t largest_word(__m512i words) {
  const __m256i half =
      _mm256_max_epu16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
  const __m128i quarter =
      _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // phminposuw finds minima: the largest of x is the complement of the smallest complement.
  const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi32(-1)));
  return 0xffffu ^ (static_cast<uint32_t>(_mm_cvtsi128_si32(smallest)) & 0xffffu);
}

// Every block size is a multiple of 32: one register of words, two of dwords.
template <class Scalar>
QLK_AVX512 void absmax_avx512(const void* weight, int64_t n_blocks, int64_t block_size,
                              uint32_t* magnitude) {
  using Storage = typename Scalar::Storage;
  const auto* w = static_cast<const Storage*>(weight);
  for (int64_t b = 0; b < n_blocks; ++b, w += block_size) {
    __m512i largest = _mm512_setzero_si512();
    if constexpr (sizeof(Storage) == 2) {
      const __m512i mask = _mm512_set1_epi16(0x7fff);
      for (int64_t i = 0; i < block_size; i += 32) {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(mask, _mm512_loadu_si512(w + i)));
      }
      magnitude[b] = largest_word(largest);
    } else {
      const __m512i mask = _mm512_set1_epi32(0x7fffffff);
      __m512i second = _mm512_setzero_si512();
      for (int64_t i = 0; i < block_size; i += 32) {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(mask, _mm512_loadu_si512(w + i)));
        second = _mm512_max_epu32(second, _mm512_and_si512(mask, _mm512_loadu_si512(w + i + 16)));
      }
      magnitude[b] = _mm512_reduce_max_epu32(_mm512_max_epu32(largest, second));
    }
  }
}

struct TreeRegisters {
  __m512 level1, level2_low, level2_high, level3, level4;
  __m512i codes;
};

QLK_AVX512 QLK_INLINE __m512i encode16(__m512 n, const TreeRegisters& tree) {
  const __mmask16 above1 = _mm512_cmp_ps_mask(n, tree.level1, _CMP_GT_OQ);
  const __m512 limit2 = _mm512_mask_blend_ps(above1, tree.level2_low, tree.level2_high);
  const __mmask16 above2 = _mm512_cmp_ps_mask(n, limit2, _CMP_GT_OQ);
  __m512i index = _mm512_maskz_mov_epi32(above1, _mm512_set1_epi32(1));
  index = _mm512_mask_or_epi32(index, above2, index, _mm512_set1_epi32(2));
  const __m512 limit3 = _mm512_permutexvar_ps(index, tree.level3);
  const __mmask16 above3 = _mm512_cmp_ps_mask(n, limit3, _CMP_GT_OQ);
  index = _mm512_mask_or_epi32(index, above3, index, _mm512_set1_epi32(4));
  const __m512 limit4 = _mm512_permutexvar_ps(index, tree.level4);
  const __mmask16 above4 = _mm512_cmp_ps_mask(n, limit4, _CMP_GT_OQ);
  index = _mm512_mask_or_epi32(index, above4, index, _mm512_set1_epi32(8));
  return _mm512_permutexvar_epi32(index, tree.codes);
}

// 64 codes, 16 to a register, as 32 bytes: the even one of a pair in the high nibble.
QLK_AVX512 QLK_INLINE __m256i pack64(__m512i c0, __m512i c1, __m512i c2, __m512i c3) {
  // Packing works within 128-bit lanes: lane L of `bytes` holds 4 codes each of lane L of c0..c3.
  const __m512i bytes =
      _mm512_packus_epi16(_mm512_packus_epi32(c0, c1), _mm512_packus_epi32(c2, c3));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i ordered = _mm512_permutexvar_epi32(order, bytes);
  // 16 * even + odd in each word.
  return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(ordered, _mm512_set1_epi16(0x0110)));
}

template <class Scalar>
QLK_AVX512 void encode_avx512(const void* weight, int64_t n_blocks, int64_t block_size,
                              const float* inverse, const EncodeTree& tree, uint8_t* codes) {
  const auto* w = static_cast<const typename Scalar::Storage*>(weight);
  const TreeRegisters registers = {_mm512_load_ps(tree.level1),    _mm512_set1_ps(tree.level2[0]),
                                   _mm512_set1_ps(tree.level2[1]), _mm512_load_ps(tree.level3),
                                   _mm512_load_ps(tree.level4),    _mm512_load_si512(tree.codes)};
  for (int64_t b = 0; b < n_blocks; ++b) {
    const __m512 r = _mm512_set1_ps(inverse[b]);
    int64_t i = 0;
    for (; i + 64 <= block_size; i += 64, w += 64, codes += 32) {
      __m512i c[4];
      for (int j = 0; j < 4; ++j)
        c[j] = encode16(_mm512_mul_ps(avx512::load16<Scalar>(w + 16 * j), r), registers);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), pack64(c[0], c[1], c[2], c[3]));
    }
    if (i < block_size) {  // block_size 32
      const __m512i c0 = encode16(_mm512_mul_ps(avx512::load16<Scalar>(w), r), registers);
      const __m512i c1 = encode16(_mm512_mul_ps(avx512::load16<Scalar>(w + 16), r), registers);
      const __m256i packed = pack64(c0, c1, c0, c1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm256_castsi256_si128(packed));
      w += 32;
      codes += 16;
    }
  }
}

template <class Scalar>
constexpr QuantizePath kAvx512Path = {absmax_avx512<Scalar>, encode_avx512<Scalar>};

}  // namespace

QuantizePath quantize_path_avx512(DType dtype) {
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
