// Inner products of decoded weights with a few tokens.
#pragma once

#include "qlk/interleave.h"
#include "qlk/types.h"

namespace qlk {

// Partial sums per token; every path adds its lanes in the same places for every token.
constexpr int64_t kDotLanes = 16;

// sums[t][lane] += the products weights[i] * x[t * x_stride + i], i in [0, count).
void dot_chunk(const float* weights, int64_t count, const float* x, int64_t x_stride,
               int64_t tokens, Isa isa, float* sums);

inline float sum_lanes(const float* lanes) {
  float halves[8];
  for (int i = 0; i < 8; ++i) halves[i] = lanes[i] + lanes[i + 8];
  return ((halves[0] + halves[4]) + (halves[2] + halves[6])) +
         ((halves[1] + halves[5]) + (halves[3] + halves[7]));
}

// acc[t * acc_stride + j] += sum over r of factors[t * factor_stride + r] * rows[r * row_stride +
// j], j in [0, count), r in [0, kAxpyRows).
constexpr int64_t kAxpyRows = 4;
void add_rows(const float* rows, int64_t row_stride, int64_t count, const float* factors,
              int64_t factor_stride, int64_t tokens, Isa isa, float* acc, int64_t acc_stride);

// The AVX-512 path that never stores a decoded weight, over rows of x that `interleave_row` laid
// out.
bool strip_interleaved_runs(Isa isa);
// Floats of scratch that the decoded scales of its rows need.
int64_t interleaved_scale_count(const QuantizedView& weight);
// out[t * out_stride + i] = x[t] · Ŵ[row_begin + i].
void strip_interleaved(const QuantizedView& weight, XLayout layout, const float* x, int64_t tokens,
                       int64_t row_begin, int64_t rows, float* scales, int64_t out_stride,
                       float* out);

}  // namespace qlk
