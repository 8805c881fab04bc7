// quantize_blockwise and dequantize_blockwise: some thousand elements at a time, so that what is
// widened to fp32 stays in the first-level cache.
#include "qlk/blockwise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "double_quantize_path.h"
#include "qlk/convert.h"
#include "qlk/float16.h"
#include "qlk/isa.h"

namespace qlk {
namespace {

constexpr float kSmallestNormal = 0x1p-126f;
constexpr int64_t kChunk = 4096;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;
constexpr uint32_t kInfinity = 0x7f800000u;

// The largest magnitude's bits, which order as the magnitudes do, NaN above all.
QLK_INLINE uint32_t largest_of(const float* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i)
    largest = std::max(largest, static_cast<int32_t>(float_bits(values[i]) & 0x7fffffffu));
  return static_cast<uint32_t>(largest);
}

QLK_INLINE void decode_of(const uint8_t* codes, int64_t count, float scale, const float* codebook,
                          float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = codebook[codes[i]] * scale;
}

uint32_t largest_portable(const float* values, int64_t count) { return largest_of(values, count); }

void decode_portable(const uint8_t* codes, int64_t count, float scale, const float* codebook,
                     float* out) {
  decode_of(codes, count, scale, codebook, out);
}

#if defined(QLK_X86)

QLK_AVX2 uint32_t largest_avx2(const float* values, int64_t count) {
  return largest_of(values, count);
}

QLK_AVX512 uint32_t largest_avx512(const float* values, int64_t count) {
  return largest_of(values, count);
}

QLK_AVX2 void decode_avx2(const uint8_t* codes, int64_t count, float scale, const float* codebook,
                          float* out) {
  const __m256 factor = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
    const __m256 entry = _mm256_i32gather_ps(codebook, _mm256_cvtepu8_epi32(bytes), 4);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(entry, factor));
  }
  decode_of(codes + i, count - i, scale, codebook, out + i);
}

QLK_AVX512 void decode_avx512(const uint8_t* codes, int64_t count, float scale,
                              const float* codebook, float* out) {
  const __m512 factor = _mm512_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const __m512 entry = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), codebook, 4);
    _mm512_storeu_ps(out + i, _mm512_mul_ps(entry, factor));
  }
  decode_of(codes + i, count - i, scale, codebook, out + i);
}

#endif

struct Path {
  uint32_t (*largest)(const float*, int64_t);
  ScaleEncodeFn encode;
  void (*decode)(const uint8_t*, int64_t, float, const float*, float*);
};

Path choose_path(Isa isa) {
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512) return {largest_avx512, encode_scales_avx512, decode_avx512};
  if (isa >= Isa::kAvx2) return {largest_avx2, encode_scales_avx2, decode_avx2};
#else
  (void)isa;
#endif
  return {largest_portable, encode_scales_portable, decode_portable};
}

// Elements [begin, begin + count) as fp32: where they are, or widened into `buffer`.
const float* widened(const void* values, DType dtype, int64_t begin, int64_t count, Isa isa,
                     float* buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(values) + begin;
  load_f32(values, dtype, begin, count, isa, buffer);
  return buffer;
}

struct Encoding {
  alignas(64) float midpoints[256];
  uint8_t zero_code;

  explicit Encoding(const float* codebook) {
    int nearest = 0;
    for (int i = 0; i < 256; ++i) {
      if (i < 255) midpoints[i] = (codebook[i] + codebook[i + 1]) * 0.5f;
      if (std::fabs(codebook[i]) < std::fabs(codebook[nearest])) nearest = i;
    }
    midpoints[255] = std::numeric_limits<float>::infinity();
    zero_code = static_cast<uint8_t>(nearest);
  }
};

void quantize_block(const BlockwiseParams& p, const Path& path, const Encoding& encoding,
                    const void* values, int64_t block, uint8_t* codes, float* absmax, Isa isa) {
  alignas(64) float buffer[kChunk];
  const int64_t first = block * p.block_size, last = std::min(first + p.block_size, p.numel);
  uint32_t largest = 0;
  const float* wide = nullptr;
  for (int64_t i = first; i < last; i += kChunk) {
    const int64_t count = std::min(kChunk, last - i);
    wide = widened(values, p.dtype, i, count, isa, buffer);
    largest = std::max(largest, path.largest(wide, count));
  }
  if (largest == 0 || largest >= kInfinity) {
    absmax[block] = largest == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    std::fill(codes + first, codes + last, encoding.zero_code);
    return;
  }
  absmax[block] = float_from_bits(largest);
  const float inverse = 1.0f / std::max(absmax[block], kSmallestNormal);
  const bool whole = last - first <= kChunk;  // the chunk that was widened last is all of it
  for (int64_t i = first; i < last; i += kChunk) {
    const int64_t count = std::min(kChunk, last - i);
    if (!whole) wide = widened(values, p.dtype, i, count, isa, buffer);
    path.encode(wide, count, 0.0f, inverse, encoding.midpoints, codes + i);
  }
}

}  // namespace

void quantize_blockwise(const BlockwiseParams& p, const void* values, uint8_t* codes, float* absmax,
                        Isa isa, const ThreadPool& pool) {
  const Path path = choose_path(isa);
  const Encoding encoding(p.codebook);
  const int64_t n_blocks = (p.numel + p.block_size - 1) / p.block_size;
  pool.run(0, n_blocks, std::max<int64_t>(1, kGrainElements / p.block_size),
           [&](int64_t begin, int64_t end) {
             for (int64_t b = begin; b < end; ++b)
               quantize_block(p, path, encoding, values, b, codes, absmax, isa);
           });
}

void dequantize_blockwise(const BlockwiseParams& p, const uint8_t* codes, const float* absmax,
                          void* values, Isa isa, const ThreadPool& pool) {
  const Path path = choose_path(isa);
  const int64_t n_chunks = (p.numel + kChunk - 1) / kChunk;
  pool.run(0, n_chunks, kGrainElements / kChunk, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kChunk];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * kChunk, last = std::min(first + kChunk, p.numel);
      const bool in_place = p.dtype == DType::kFloat32;
      float* out = in_place ? static_cast<float*>(values) + first : buffer;
      for (int64_t i = first; i < last;) {
        const int64_t block = i / p.block_size, stop = std::min(last, (block + 1) * p.block_size);
        path.decode(codes + i, stop - i, absmax[block], p.codebook, out + (i - first));
        i = stop;
      }
      if (!in_place)
        store_f32(buffer, last - first, p.dtype, isa, element_at(values, p.dtype, first));
    }
  });
}

}  // namespace qlk
