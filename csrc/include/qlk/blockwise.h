// quantize_blockwise and dequantize_blockwise: 8-bit codes of a table of 256 values, one fp32 scale
// per block_size elements. What bitsandbytes' ops of these names compute.
#pragma once

#include "qlk/types.h"

namespace qlk {

struct BlockwiseParams {
  DType dtype = DType::kFloat32;  // of values
  int64_t numel = 0;
  int64_t block_size = 256;         // any; the last block may be short
  const float* codebook = nullptr;  // [256], ascending
};

// absmax[b] = max |values| of block b; codes[i] = the entry nearest to values[i] * (1 / absmax[b]),
// the lower one of a tie. A block of zeros gets the entry nearest to 0; one that holds a NaN or an
// infinity that too, and absmax NaN.
void quantize_blockwise(const BlockwiseParams& params, const void* values, uint8_t* codes,
                        float* absmax, Isa isa, const ThreadPool& pool);

// values[i] = codebook[codes[i]] * absmax[b], rounded to fp32 and then to dtype.
void dequantize_blockwise(const BlockwiseParams& params, const uint8_t* codes, const float* absmax,
                          void* values, Isa isa, const ThreadPool& pool);

}  // namespace qlk
