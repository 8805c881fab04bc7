// How the AVX-512 inner products (dot_interleaved.cpp) want a row of x: a vector of 16 products
// comes from the same nibbles of 16 consecutive lanes, a lane being 8 consecutive weights, 32 bits
// of codes.
#pragma once

#include "qlk/types.h"

namespace qlk {

// kFloat: per group 8 vectors, vector e the numbers that meet weight e of each lane. kInteger: per
// group 4 vectors of pairs of 16-bit integers, vector e those that meet weights kWordWeights[e] and
// kWordWeights[e] + 4, and a vector of the lanes' units.
enum class XLayout { kFloat, kInteger };

constexpr int64_t kGroup = 128, kGroupBytes = kGroup / 2, kLaneWeights = 8;
// The weight whose code is nibble e, from the lowest, of a little-endian 16-bit word of codes.
constexpr int kWordWeights[4] = {1, 0, 3, 2};
// 8 products of a lane's largest integer, 255 * 2^7 as a bf16 number has 8 significant bits, with
// the table's largest stay below 2^31.
constexpr int kXIntegerBits = 15;
constexpr int kMostTableInteger = 8191;
// What the lanes' units divide by, so that sums have the range that fp32 products would give them.
constexpr float kTableUnit = 8192.0f;

constexpr int64_t group_floats(XLayout layout) { return layout == XLayout::kFloat ? 128 : 80; }

// Rows start in that many different places of 8 weights; each needs x moved by as much.
constexpr int64_t phase_count(int64_t cols) {
  return cols % 8 == 0 ? 1 : cols % 4 == 0 ? 2 : cols % 2 == 0 ? 4 : 8;
}

// Where the copy of x for a phase is among `phase_count(cols)`.
constexpr int64_t phase_slot(int64_t phase, int64_t cols) {
  return phase * phase_count(cols) / kLaneWeights;
}

// Floats of one such copy.
constexpr int64_t interleaved_row(int64_t cols, XLayout layout) {
  const int64_t most = cols + kLaneWeights - kLaneWeights / phase_count(cols);
  return (most + kGroup - 1) / kGroup * group_floats(layout);
}

// The copies of a row of x, one after the other, zero beyond it. False, with `out` undefined, if a
// number has no place in the layout: NaN and Inf are no integers.
bool interleave_row(const void* x, DType dtype, int64_t cols, XLayout layout, float* out);

}  // namespace qlk
