// What dequantize.cpp asks of an instruction-set path: the scales of a run of blocks, and the run.
#pragma once

#include "qlk/float16.h"
#include "qlk/types.h"

namespace qlk {

// scales[i] = decoded scale of block first + i.
using DecodeScalesFn = void (*)(const ScalesView& view, int64_t first, int64_t count,
                                float* scales);
// Decodes n_blocks full blocks to `out`, contiguous. With `streaming`, `out` is 64-byte aligned and
// is written past the caches.
using DecodeBlocksFn = void (*)(const uint8_t* codes, const float* scales, int64_t n_blocks,
                                int64_t block_size, const float* codebook, bool streaming,
                                void* out);

struct DequantizePath {
  DecodeScalesFn decode_scales;
  DecodeBlocksFn decode_blocks;
};

void decode_scales_portable(const ScalesView& view, int64_t first, int64_t count, float* scales);
DequantizePath dequantize_path_avx2(DType dtype);
DequantizePath dequantize_path_avx512(DType dtype);
DequantizePath dequantize_path_avx512_bf16(DType dtype);

// Two roundings: the product of the map's value and the second-level scale, then the sum.
inline float decode_nested_scale(const ScalesView& view, int64_t block) {
  const float product = view.scale_codebook[view.scale_codes[block]] *
                        view.scale_absmax[block / view.scale_block_size];
  return product + *view.scale_offset;
}

}  // namespace qlk
