// dropout: element i of a row-major tensor is kept iff word i % 4 of Philox4x32-10 at counter i / 4
// reaches a threshold, so that the mask is a function of (seed, i) and is never stored.
#pragma once

#include "qlk/quantized_matmul.h"

namespace qlk {

// The mask of probability p in [0, 1] and a seed's 64 bits.
inline DropoutMask dropout_mask(double p, int64_t seed) {
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(p * 0x1p32),
          static_cast<float>(1.0 / (1.0 - p))};
}

// factors[j] = keep_scale if element begin + j is kept, else 0.
void dropout_factors(const DropoutMask& mask, int64_t begin, int64_t count, Isa isa,
                     float* factors);

// out = x with dropped elements 0 (NaN or not) and the kept ones times keep_scale, rounded to
// dtype.
void dropout(const DropoutMask& mask, const void* x, DType dtype, int64_t numel, Isa isa,
             const ThreadPool& pool, void* out);

}  // namespace qlk
