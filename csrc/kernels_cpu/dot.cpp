// Inner products and row updates over decoded weights, a path per instruction set. Whatever the
// number of tokens, each token's additions happen in the same order.
#include "qlk/dot.h"

#include "qlk/isa.h"

namespace qlk {
namespace {

void dot_portable(const float* weights, int64_t count, const float* x, int64_t x_stride,
                  int64_t tokens, float* sums) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = x + t * x_stride;
    float* lanes = sums + t * kDotLanes;
    int64_t i = 0;
    for (; i + kDotLanes <= count; i += kDotLanes)
      for (int64_t j = 0; j < kDotLanes; ++j) lanes[j] += weights[i + j] * row[i + j];
    for (int64_t j = 0; i + j < count; ++j) lanes[j] += weights[i + j] * row[i + j];
  }
}

void add_rows_portable(const float* rows, int64_t row_stride, int64_t count, const float* factors,
                       int64_t factor_stride, int64_t tokens, float* acc, int64_t acc_stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* f = factors + t * factor_stride;
    float* out = acc + t * acc_stride;
    for (int64_t j = 0; j < count; ++j) {
      float sum = out[j];
      for (int64_t r = 0; r < kAxpyRows; ++r) sum += f[r] * rows[r * row_stride + j];
      out[j] = sum;
    }
  }
}

#if defined(QLK_X86)

// Tokens [t, t + kCount) of dot_chunk; chains of additions per token hide the latency.
template <int kCount>
QLK_AVX512 QLK_INLINE void dot_tokens_avx512(const float* weights, int64_t count, const float* x,
                                             int64_t x_stride, float* sums) {
  constexpr int kChains = 4;
  __m512 chains[kCount][kChains];
  for (int t = 0; t < kCount; ++t) {
    chains[t][0] = _mm512_loadu_ps(sums + t * kDotLanes);
    for (int c = 1; c < kChains; ++c) chains[t][c] = _mm512_setzero_ps();
  }
  int64_t i = 0;
  for (; i + 16 * kChains <= count; i += 16 * kChains) {
    for (int c = 0; c < kChains; ++c) {
      const __m512 value = _mm512_loadu_ps(weights + i + 16 * c);
      for (int t = 0; t < kCount; ++t)
        chains[t][c] =
            _mm512_fmadd_ps(value, _mm512_loadu_ps(x + t * x_stride + i + 16 * c), chains[t][c]);
    }
  }
  for (; i < count; i += 16) {
    const __mmask16 mask = _cvtu32_mask16(count - i >= 16 ? 0xffffu : (1u << (count - i)) - 1u);
    const __m512 value = _mm512_maskz_loadu_ps(mask, weights + i);
    for (int t = 0; t < kCount; ++t)
      chains[t][0] =
          _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, x + t * x_stride + i), chains[t][0]);
  }
  for (int t = 0; t < kCount; ++t)
    _mm512_storeu_ps(sums + t * kDotLanes,
                     _mm512_add_ps(_mm512_add_ps(chains[t][0], chains[t][1]),
                                   _mm512_add_ps(chains[t][2], chains[t][3])));
}

QLK_AVX512 void dot_avx512(const float* weights, int64_t count, const float* x, int64_t x_stride,
                           int64_t tokens, float* sums) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    dot_tokens_avx512<4>(weights, count, x + t * x_stride, x_stride, sums + t * kDotLanes);
  for (; t < tokens; ++t)
    dot_tokens_avx512<1>(weights, count, x + t * x_stride, x_stride, sums + t * kDotLanes);
}

// Two vectors are a token's 16 lanes; with two tokens that makes 8 chains of additions.
template <int kCount>
QLK_AVX2 QLK_INLINE void dot_tokens_avx2(const float* weights, int64_t count, const float* x,
                                         int64_t x_stride, float* sums) {
  constexpr int kChains = 4;
  __m256 chains[kCount][kChains];
  for (int t = 0; t < kCount; ++t) {
    for (int c = 0; c < 2; ++c) chains[t][c] = _mm256_loadu_ps(sums + t * kDotLanes + 8 * c);
    for (int c = 2; c < kChains; ++c) chains[t][c] = _mm256_setzero_ps();
  }
  int64_t i = 0;
  for (; i + 8 * kChains <= count; i += 8 * kChains) {
    for (int c = 0; c < kChains; ++c) {
      const __m256 value = _mm256_loadu_ps(weights + i + 8 * c);
      for (int t = 0; t < kCount; ++t)
        chains[t][c] =
            _mm256_fmadd_ps(value, _mm256_loadu_ps(x + t * x_stride + i + 8 * c), chains[t][c]);
    }
  }
  for (int t = 0; t < kCount; ++t) {
    float* lanes = sums + t * kDotLanes;
    _mm256_storeu_ps(lanes, _mm256_add_ps(chains[t][0], chains[t][2]));
    _mm256_storeu_ps(lanes + 8, _mm256_add_ps(chains[t][1], chains[t][3]));
    for (int64_t j = 0; i + j < count; ++j)
      lanes[j % kDotLanes] += weights[i + j] * x[t * x_stride + i + j];
  }
}

QLK_AVX2 void dot_avx2(const float* weights, int64_t count, const float* x, int64_t x_stride,
                       int64_t tokens, float* sums) {
  int64_t t = 0;
  for (; t + 2 <= tokens; t += 2)
    dot_tokens_avx2<2>(weights, count, x + t * x_stride, x_stride, sums + t * kDotLanes);
  if (t < tokens)
    dot_tokens_avx2<1>(weights, count, x + t * x_stride, x_stride, sums + t * kDotLanes);
}

QLK_AVX512 void add_rows_avx512(const float* rows, int64_t row_stride, int64_t count,
                                const float* factors, int64_t factor_stride, int64_t tokens,
                                float* acc, int64_t acc_stride) {
  for (int64_t j = 0; j < count; j += 16) {
    const __mmask16 mask = _cvtu32_mask16(count - j >= 16 ? 0xffffu : (1u << (count - j)) - 1u);
    __m512 values[kAxpyRows];
    for (int64_t r = 0; r < kAxpyRows; ++r)
      values[r] = _mm512_maskz_loadu_ps(mask, rows + r * row_stride + j);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* f = factors + t * factor_stride;
      float* out = acc + t * acc_stride + j;
      __m512 sum = _mm512_maskz_loadu_ps(mask, out);
      for (int64_t r = 0; r < kAxpyRows; ++r)
        sum = _mm512_fmadd_ps(_mm512_set1_ps(f[r]), values[r], sum);
      _mm512_mask_storeu_ps(out, mask, sum);
    }
  }
}

QLK_AVX2 void add_rows_avx2(const float* rows, int64_t row_stride, int64_t count,
                            const float* factors, int64_t factor_stride, int64_t tokens, float* acc,
                            int64_t acc_stride) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    __m256 values[kAxpyRows];
    for (int64_t r = 0; r < kAxpyRows; ++r) values[r] = _mm256_loadu_ps(rows + r * row_stride + j);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* f = factors + t * factor_stride;
      float* out = acc + t * acc_stride + j;
      __m256 sum = _mm256_loadu_ps(out);
      for (int64_t r = 0; r < kAxpyRows; ++r)
        sum = _mm256_fmadd_ps(_mm256_set1_ps(f[r]), values[r], sum);
      _mm256_storeu_ps(out, sum);
    }
  }
  if (j < count)
    add_rows_portable(rows + j, row_stride, count - j, factors, factor_stride, tokens, acc + j,
                      acc_stride);
}

#endif

}  // namespace

void dot_chunk(const float* weights, int64_t count, const float* x, int64_t x_stride,
               int64_t tokens, Isa isa, float* sums) {
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512) return dot_avx512(weights, count, x, x_stride, tokens, sums);
  if (isa == Isa::kAvx2) return dot_avx2(weights, count, x, x_stride, tokens, sums);
#endif
  dot_portable(weights, count, x, x_stride, tokens, sums);
}

void add_rows(const float* rows, int64_t row_stride, int64_t count, const float* factors,
              int64_t factor_stride, int64_t tokens, Isa isa, float* acc, int64_t acc_stride) {
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512)
    return add_rows_avx512(rows, row_stride, count, factors, factor_stride, tokens, acc,
                           acc_stride);
  if (isa == Isa::kAvx2)
    return add_rows_avx2(rows, row_stride, count, factors, factor_stride, tokens, acc, acc_stride);
#endif
  add_rows_portable(rows, row_stride, count, factors, factor_stride, tokens, acc, acc_stride);
}

}  // namespace qlk
