// double_quantize: fp32 absmax to 8-bit codes, one fp32 scale per scale_block_size of them, and one
// offset.
#pragma once

#include "qlk/types.h"

namespace qlk {

struct DoubleQuantizeParams {
  const float* absmax = nullptr;          // [n_blocks]
  const float* scale_codebook = nullptr;  // [256], ascending
  int64_t n_blocks = 0;
  int64_t scale_block_size = 256;

  uint8_t* scale_codes = nullptr;  // [n_blocks]
  float* scale_absmax = nullptr;   // [ceil(n_blocks / scale_block_size)]
  float* scale_offset = nullptr;   // [1]
};

Status double_quantize(const DoubleQuantizeParams& params, Isa isa, const ThreadPool& pool);

}  // namespace qlk
