// quantize: a flattened weight to packed 4-bit codes and one fp32 absmax per block.
#pragma once

#include "qlk/types.h"

namespace qlk {

struct QuantizeParams {
  const void* weight = nullptr;  // [numel], row-major flattening
  DType dtype = DType::kFloat32;
  int64_t numel = 0;
  int64_t block_size = 64;

  // rank = number of boundaries strictly below the normalised element, code = rank_codes[rank].
  // With `scales`, midpoints are used in place of boundaries and elements are compared with
  // midpoint * scale in fp64.
  int32_t n_levels = 16;                // 2 ... 16
  const float* boundaries = nullptr;    // [n_levels - 1], ascending
  const double* midpoints = nullptr;    // [n_levels - 1], ascending
  const uint8_t* rank_codes = nullptr;  // [n_levels]
  uint8_t zero_code = 0;
  const float* scales = nullptr;  // [n_blocks], decoded scales to encode against, or null

  uint8_t* codes = nullptr;  // [ceil(numel / 2)]
  float* absmax = nullptr;   // [n_blocks]; NaN where a block holds a NaN or an infinity
};

Status quantize(const QuantizeParams& params, Isa isa, const ThreadPool& pool);

}  // namespace qlk
