// The AVX2 path of quantize: an 8-lane tree search by vpermps, 32 codes packed at a time.
#include "qlk/isa.h"
#include "qlk/simd_avx2.h"
#include "quantize_path.h"

#if defined(QLK_X86)

namespace qlk {
namespace {

template <class Scalar>
QLK_AVX2 void absmax_avx2(const void* weight, int64_t n_blocks, int64_t block_size,
                          uint32_t* magnitude) {
  using Storage = typename Scalar::Storage;
  constexpr int64_t kLanes = 32 / sizeof(Storage);
  const auto* w = static_cast<const Storage*>(weight);
  for (int64_t b = 0; b < n_blocks; ++b, w += block_size) {
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < block_size; i += kLanes) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i));
      if constexpr (sizeof(Storage) == 2) {
        largest = _mm256_max_epu16(largest, _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)));
      } else {
        largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
      }
    }
    const __m128i low = _mm256_castsi256_si128(largest);
    const __m128i high = _mm256_extracti128_si256(largest, 1);
    if constexpr (sizeof(Storage) == 2) {
      // phminposuw finds minima: the largest of x is the complement of the smallest complement.
      const __m128i inverted = _mm_xor_si128(_mm_max_epu16(low, high), _mm_set1_epi32(-1));
      const int smallest = _mm_cvtsi128_si32(_mm_minpos_epu16(inverted));
      magnitude[b] = 0xffffu ^ (static_cast<uint32_t>(smallest) & 0xffffu);
    } else {
      __m128i m = _mm_max_epu32(low, high);
      m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
      m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
      magnitude[b] = static_cast<uint32_t>(_mm_cvtsi128_si32(m));
    }
  }
}

struct TreeRegisters {
  __m256 level1, level2_low, level2_high, level3, level4;
  __m256i codes;
};

// The tree index of 8 elements; the codes are looked up once they are bytes.
QLK_AVX2 QLK_INLINE __m256i search8(__m256 n, const TreeRegisters& tree) {
  const __m256 above1 = _mm256_cmp_ps(n, tree.level1, _CMP_GT_OQ);
  const __m256 limit2 = _mm256_blendv_ps(tree.level2_low, tree.level2_high, above1);
  const __m256 above2 = _mm256_cmp_ps(n, limit2, _CMP_GT_OQ);
  __m256i index = _mm256_and_si256(_mm256_castps_si256(above1), _mm256_set1_epi32(1));
  index =
      _mm256_or_si256(index, _mm256_and_si256(_mm256_castps_si256(above2), _mm256_set1_epi32(2)));
  const __m256 limit3 = _mm256_permutevar8x32_ps(tree.level3, index);
  const __m256 above3 = _mm256_cmp_ps(n, limit3, _CMP_GT_OQ);
  index =
      _mm256_or_si256(index, _mm256_and_si256(_mm256_castps_si256(above3), _mm256_set1_epi32(4)));
  const __m256 limit4 = _mm256_permutevar8x32_ps(tree.level4, index);
  const __m256 above4 = _mm256_cmp_ps(n, limit4, _CMP_GT_OQ);
  return _mm256_or_si256(index,
                         _mm256_and_si256(_mm256_castps_si256(above4), _mm256_set1_epi32(8)));
}

template <class Scalar>
QLK_AVX2 void encode_avx2(const void* weight, int64_t n_blocks, int64_t block_size,
                          const float* inverse, const EncodeTree& tree, uint8_t* codes) {
  const auto* w = static_cast<const typename Scalar::Storage*>(weight);
  const __m128i code_bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(tree.code_bytes));
  const TreeRegisters registers = {
      _mm256_load_ps(tree.level1),    _mm256_set1_ps(tree.level2[0]),
      _mm256_set1_ps(tree.level2[1]), _mm256_load_ps(tree.level3),
      _mm256_load_ps(tree.level4),    _mm256_broadcastsi128_si256(code_bytes)};
  for (int64_t b = 0; b < n_blocks; ++b) {
    const __m256 r = _mm256_set1_ps(inverse[b]);
    for (int64_t i = 0; i < block_size; i += 32, w += 32, codes += 16) {
      __m256i c[4];
      for (int j = 0; j < 4; ++j)
        c[j] = search8(_mm256_mul_ps(avx2::load8<Scalar>(w + 8 * j), r), registers);
      // Packing works within 128-bit lanes: lane L holds 4 codes each of lane L of c[0..3].
      const __m256i index =
          _mm256_packus_epi16(_mm256_packus_epi32(c[0], c[1]), _mm256_packus_epi32(c[2], c[3]));
      const __m256i bytes = _mm256_shuffle_epi8(registers.codes, index);
      // 16 * even + odd in each word, then words to bytes.
      const __m256i words = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
      const __m256i pairs = _mm256_packus_epi16(words, words);
      const __m128i packed =
          _mm_unpacklo_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), packed);
    }
  }
}

template <class Scalar>
constexpr QuantizePath kAvx2Path = {absmax_avx2<Scalar>, encode_avx2<Scalar>};

}  // namespace

QuantizePath quantize_path_avx2(DType dtype) {
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
