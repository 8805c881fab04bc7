// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): key = the
// seed's halves, counter = the halves of element / 4, and word element % 4 of the output.
#include "qlk/dropout.h"

#include <algorithm>

#include "qlk/convert.h"
#include "qlk/float16.h"
#include "qlk/isa.h"

namespace qlk {
namespace {

constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
constexpr uint32_t kKeyStep0 = 0x9e3779b9u, kKeyStep1 = 0xbb67ae85u;
constexpr int kRounds = 10;
// Counters computed side by side: the compiler maps them to vector lanes.
constexpr int64_t kLanes = 16;
constexpr int64_t kWords = 4 * kLanes;

// words[4 * lane + w] of counters first ... first + kLanes - 1.
QLK_INLINE void philox_words(uint64_t seed, uint64_t first, uint32_t* words) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(counter);
    c1[i] = static_cast<uint32_t>(counter >> 32);
    c2[i] = c3[i] = 0;
  }
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t product0 = uint64_t{kMultiplier0} * c0[i];
      const uint64_t product1 = uint64_t{kMultiplier1} * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(product1);
      c3[i] = static_cast<uint32_t>(product0);
    }
    k0 += kKeyStep0;
    k1 += kKeyStep1;
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

QLK_INLINE void factors_of(const DropoutMask& mask, int64_t begin, int64_t count, float* factors) {
  int64_t done = 0;
  while (done < count) {
    const int64_t element = begin + done, skip = element & 3;
    uint32_t words[kWords];
    philox_words(mask.seed, static_cast<uint64_t>(element >> 2), words);
    const int64_t part = std::min(count - done, kWords - skip);
    for (int64_t i = 0; i < part; ++i)
      factors[done + i] = words[skip + i] >= mask.threshold ? mask.keep_scale : 0.0f;
    done += part;
  }
}

void factors_portable(const DropoutMask& mask, int64_t begin, int64_t count, float* factors) {
  factors_of(mask, begin, count, factors);
}

#if defined(QLK_X86)

QLK_AVX2 void factors_avx2(const DropoutMask& mask, int64_t begin, int64_t count, float* factors) {
  factors_of(mask, begin, count, factors);
}

QLK_AVX512 void factors_avx512(const DropoutMask& mask, int64_t begin, int64_t count,
                               float* factors) {
  factors_of(mask, begin, count, factors);
}

#endif

}  // namespace

void dropout_factors(const DropoutMask& mask, int64_t begin, int64_t count, Isa isa,
                     float* factors) {
  // The threshold of p = 1, 2^32, is above every word, and its 1 / (1 - p) is infinite.
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512) return factors_avx512(mask, begin, count, factors);
  if (isa == Isa::kAvx2) return factors_avx2(mask, begin, count, factors);
#endif
  factors_portable(mask, begin, count, factors);
}

void dropout(const DropoutMask& mask, const void* x, DType dtype, int64_t numel, Isa isa,
             const ThreadPool& pool, void* out) {
  constexpr int64_t kPiece = 1024;
  pool.run(0, (numel + kPiece - 1) / kPiece, 8, [&](int64_t first, int64_t last) {
    float values[kPiece], factors[kPiece];
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * kPiece, count = std::min(kPiece, numel - begin);
      load_f32(x, dtype, begin, count, isa, values);
      dropout_factors(mask, begin, count, isa, factors);
      for (int64_t i = 0; i < count; ++i)
        values[i] = factors[i] != 0.0f ? values[i] * factors[i] : 0.0f;
      store_f32(values, count, dtype, isa, element_at(out, dtype, begin));
    }
  });
}

}  // namespace qlk
