// First-level scales of a run of blocks, decoded to fp32: fl(fl(map[code] * scale_absmax) +
// offset).
#pragma once

#include <algorithm>
#include <bit>

#include "qlk/isa.h"
#include "qlk/types.h"

namespace qlk {

// Scales of single blocks.
class ScaleReader {
 public:
  explicit ScaleReader(const ScalesView& scales)
      : scales_(scales),
        offset_(scales.nested() ? *scales.scale_offset : 0.0f),
        is_power_(std::has_single_bit(static_cast<uint64_t>(scales.scale_block_size))),
        shift_(std::countr_zero(static_cast<uint64_t>(scales.scale_block_size))) {}

  QLK_INLINE float operator()(int64_t block) const {
    if (!scales_.nested()) return scales_.absmax[block];
    // A division would take longer than all the rest.
    const int64_t group = is_power_ ? block >> shift_ : block / scales_.scale_block_size;
    return scales_.scale_codebook[scales_.scale_codes[block]] * scales_.scale_absmax[group] +
           offset_;
  }

 private:
  const ScalesView scales_;
  float offset_;
  bool is_power_;
  int shift_;
};

QLK_INLINE void decode_scales(const ScalesView& scales, int64_t begin, int64_t count, float* out) {
  const ScaleReader scale_of(scales);
  for (int64_t i = 0; i < count; ++i) out[i] = scale_of(begin + i);
}

#if defined(QLK_X86)

QLK_AVX512 QLK_INLINE void decode_scales_avx512(const ScalesView& scales, int64_t begin,
                                                int64_t count, float* out) {
  if (!scales.nested()) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = _cvtu32_mask16(count - i >= 16 ? 0xffffu : (1u << (count - i)) - 1u);
      _mm512_mask_storeu_ps(out + i, mask, _mm512_maskz_loadu_ps(mask, scales.absmax + begin + i));
    }
    return;
  }
  const __m512 offset = _mm512_set1_ps(*scales.scale_offset);
  const auto size = static_cast<uint64_t>(scales.scale_block_size);
  const bool is_power = std::has_single_bit(size);
  int64_t i = 0;
  while (i < count) {
    // A row of a weight is decoded in little more time than a division takes.
    const int64_t group =
        is_power ? (begin + i) >> std::countr_zero(size) : (begin + i) / scales.scale_block_size;
    const int64_t group_end = std::min(count, (group + 1) * scales.scale_block_size - begin);
    const __m512 group_scale = _mm512_set1_ps(scales.scale_absmax[group]);
    for (; i + 16 <= group_end; i += 16) {
      const auto* codes = reinterpret_cast<const __m128i*>(scales.scale_codes + begin + i);
      const __m512 values = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(codes)),
                                                scales.scale_codebook, 4);
      _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_mul_ps(values, group_scale), offset));
    }
    if (i < group_end) {
      const int64_t left = group_end - i;
      const __mmask16 mask = _cvtu32_mask16((1u << left) - 1u);
      const __m512i codes =
          _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, scales.scale_codes + begin + i));
      const __m512 values = _mm512_i32gather_ps(codes, scales.scale_codebook, 4);
      _mm512_mask_storeu_ps(out + i, mask,
                            _mm512_add_ps(_mm512_mul_ps(values, group_scale), offset));
    }
    i = group_end;
  }
}

#endif

}  // namespace qlk
