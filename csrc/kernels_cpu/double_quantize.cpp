// double_quantize: one offset for all scales, then per second-level block the largest distance from
// it and the nearest codes.
#include "qlk/double_quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "double_quantize_path.h"
#include "qlk/isa.h"

namespace qlk {
namespace {

constexpr float kSmallestNormal = 0x1p-126f;
constexpr int64_t kSumChunk = 8192;
constexpr int64_t kGrainScales = 4096;

// An unevaluated sum of two doubles: about 106 bits, so that adding n fp32 values keeps an error of
// n * 2^-106 and the result rounds to fp64 as the exact sum does.
struct DoubleDouble {
  double high = 0, low = 0;

  void add(double value) {
    const double sum = high + value;
    const double shifted = sum - high;
    low += (high - (sum - shifted)) + (value - shifted);
    high = sum;
  }
};

// Independent lanes let the compiler vectorise the serial chain of each.
DoubleDouble sum_chunk(const float* values, int64_t count) {
  constexpr int kLanes = 16;
  DoubleDouble lanes[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j].add(values[i + j]);
  DoubleDouble total;
  for (; i < count; ++i) total.add(values[i]);
  for (const DoubleDouble& lane : lanes) {
    total.add(lane.high);
    total.low += lane.low;
  }
  return total;
}

// The sum in fp64, the same bits for every number of threads: chunks are fixed and added in order.
double exact_sum(const float* values, int64_t count, const ThreadPool& pool) {
  const int64_t n_chunks = (count + kSumChunk - 1) / kSumChunk;
  std::vector<DoubleDouble> partial(n_chunks);
  pool.run(0, n_chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * kSumChunk;
      partial[c] = sum_chunk(values + first, std::min(kSumChunk, count - first));
    }
  });
  DoubleDouble total;
  for (const DoubleDouble& part : partial) {
    total.add(part.high);
    total.low += part.low;
  }
  if (std::isfinite(total.high)) return total.high + total.low;
  // The compensation of an infinite sum is NaN: the plain sum tells infinities from NaN.
  double plain = 0;
  for (int64_t i = 0; i < count; ++i) plain += values[i];
  return plain;
}

float largest_distance(const float* values, int64_t count, float offset) {
  float largest = 0;
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) {
    const float distance = std::fabs(values[i] - offset);
    nan |= std::isnan(distance);
    largest = std::max(largest, distance);
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : largest;
}

uint8_t code_of_zero(const float* codebook) {
  int nearest = 0;
  for (int i = 1; i < 256; ++i)
    if (std::fabs(codebook[i]) < std::fabs(codebook[nearest])) nearest = i;
  return static_cast<uint8_t>(nearest);
}

ScaleEncodeFn choose_path(Isa isa) {
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512) return encode_scales_avx512;
  if (isa >= Isa::kAvx2) return encode_scales_avx2;
#else
  (void)isa;
#endif
  return encode_scales_portable;
}

}  // namespace

void encode_scales_portable(const float* absmax, int64_t count, float offset, float inverse,
                            const float* midpoints, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float n = (absmax[i] - offset) * inverse;
    uint32_t rank = 0;
    for (uint32_t step = 128; step != 0; step >>= 1)
      rank += midpoints[rank + step - 1] >= n ? 0 : step;
    codes[i] = static_cast<uint8_t>(rank);
  }
}

Status double_quantize(const DoubleQuantizeParams& p, Isa isa, const ThreadPool& pool) try {
  if (p.n_blocks == 0) {
    *p.scale_offset = 0;
    return Status::kOk;
  }
  const double sum = exact_sum(p.absmax, p.n_blocks, pool);
  const float offset = static_cast<float>(sum / static_cast<double>(p.n_blocks));
  *p.scale_offset = offset;

  alignas(64) float midpoints[256];
  for (int i = 0; i < 255; ++i)
    midpoints[i] = (p.scale_codebook[i] + p.scale_codebook[i + 1]) * 0.5f;
  midpoints[255] = std::numeric_limits<float>::infinity();
  const uint8_t zero_code = code_of_zero(p.scale_codebook);
  const ScaleEncodeFn encode = choose_path(isa);

  const int64_t size = p.scale_block_size, n_second = (p.n_blocks + size - 1) / size;
  const int64_t grain = std::max<int64_t>(1, kGrainScales / size);
  pool.run(0, n_second, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * size, count = std::min(size, p.n_blocks - first);
      const float scale = largest_distance(p.absmax + first, count, offset);
      p.scale_absmax[b] = scale;
      uint8_t* codes = p.scale_codes + first;
      if (scale == 0 || std::isnan(scale)) {
        std::fill(codes, codes + count, zero_code);
      } else {
        const float inverse = 1.0f / std::max(scale, kSmallestNormal);
        encode(p.absmax + first, count, offset, inverse, midpoints, codes);
      }
    }
  });
  return Status::kOk;
} catch (const std::bad_alloc&) {
  return Status::kOutOfMemory;
}

}  // namespace qlk
