// Rows of x in the order of the AVX-512 inner products: interleave.h.
#include "qlk/interleave.h"

#include <algorithm>

#include "qlk/convert.h"
#include "qlk/isa.h"

namespace qlk {

#if defined(QLK_X86)

namespace {

constexpr int64_t kRun = 8 * kGroup;

// lanes[e]: number e of each lane of a group.
QLK_AVX512 QLK_INLINE void load_lanes(const float* x, __m512* lanes) {
  const __m512i index =
      _mm512_mullo_epi32(_mm512_set1_epi32(kLaneWeights),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  QLK_UNROLL
  for (int e = 0; e < kLaneWeights; ++e) lanes[e] = _mm512_i32gather_ps(index, x + e, 4);
}

QLK_AVX512 void store_floats(const float* x, int64_t groups, float* out) {
  for (int64_t g = 0; g < groups; ++g, x += kGroup, out += group_floats(XLayout::kFloat)) {
    __m512 lanes[kLaneWeights];
    load_lanes(x, lanes);
    QLK_UNROLL
    for (int e = 0; e < kLaneWeights; ++e) _mm512_storeu_ps(out + 16 * e, lanes[e]);
  }
}

// A lane's unit is the power of two that brings its largest number to kXIntegerBits bits. A bf16
// number down to 1/32 of that is met exactly, others to half a unit.
QLK_AVX512 bool store_integers(const float* x, int64_t groups, float* out) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), infinity = _mm512_set1_epi32(0x7f800000);
  __mmask16 no_integer = 0;
  for (int64_t g = 0; g < groups; ++g, x += kGroup, out += group_floats(XLayout::kInteger)) {
    __m512 lanes[kLaneWeights];
    load_lanes(x, lanes);
    __m512i most = _mm512_setzero_si512();
    QLK_UNROLL
    for (int e = 0; e < kLaneWeights; ++e)
      most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(lanes[e]), magnitude));
    no_integer |= _mm512_cmpge_epu32_mask(most, infinity);
    // Bounded, for a lane of zeros has no exponent: -Inf.
    const __m512 exponent =
        _mm512_max_ps(_mm512_getexp_ps(_mm512_castsi512_ps(most)), _mm512_set1_ps(-149.0f));
    const __m512 unit = _mm512_sub_ps(exponent, _mm512_set1_ps(kXIntegerBits - 1));
    const __m512 inverse = _mm512_sub_ps(_mm512_setzero_ps(), unit);
    __m512i integers[kLaneWeights];
    QLK_UNROLL
    for (int e = 0; e < kLaneWeights; ++e)
      integers[e] = _mm512_cvtps_epi32(_mm512_scalef_ps(lanes[e], inverse));
    QLK_UNROLL
    for (int e = 0; e < 4; ++e) {
      const __m512i high = _mm512_slli_epi32(integers[kWordWeights[e] + 4], 16);
      _mm512_storeu_si512(out + 16 * e,
                          _mm512_mask_blend_epi16(0xaaaaaaaa, integers[kWordWeights[e]], high));
    }
    const __m512 shared = _mm512_sub_ps(unit, _mm512_getexp_ps(_mm512_set1_ps(kTableUnit)));
    _mm512_storeu_ps(out + 64, _mm512_scalef_ps(_mm512_set1_ps(1.0f), shared));
  }
  return no_integer == 0;
}

}  // namespace

bool interleave_row(const void* x, DType dtype, int64_t cols, XLayout layout, float* out) {
  alignas(64) float run[kRun];
  bool fits = true;
  for (int64_t slot = 0; slot < phase_count(cols); ++slot) {
    const int64_t phase = slot * kLaneWeights / phase_count(cols), end = phase + cols;
    float* row = out + slot * interleaved_row(cols, layout);
    for (int64_t k = 0; k < end; k += kRun) {
      const int64_t first = std::max(k, phase), last = std::min(k + kRun, end);
      const int64_t groups = (last - k + kGroup - 1) / kGroup;
      std::fill_n(run, first - k, 0.0f);
      load_f32(x, dtype, first - phase, last - first, Isa::kAvx512, run + (first - k));
      std::fill(run + (last - k), run + groups * kGroup, 0.0f);
      float* target = row + k / kGroup * group_floats(layout);
      if (layout == XLayout::kFloat)
        store_floats(run, groups, target);
      else
        fits &= store_integers(run, groups, target);
    }
  }
  return fits;
}

#else

bool interleave_row(const void*, DType, int64_t, XLayout, float*) { return false; }

#endif

}  // namespace qlk
