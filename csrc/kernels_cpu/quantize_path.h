// What quantize.cpp asks of an instruction-set path: two loops over full blocks.
#pragma once

#include <algorithm>
#include <limits>

#include "qlk/float16.h"
#include "qlk/types.h"

namespace qlk {

// The boundaries as a balanced search tree. A path collects one bit per level, from the lowest bit
// up: index = (n > level1[0]) | (n > level2[index]) << 1 | ..., so that no level needs a shift. The
// tables repeat to fill a vector register, and rank_codes is stored under the bit-reversed rank.
struct EncodeTree {
  alignas(64) float level1[16], level2[16], level3[16], level4[16];
  alignas(64) uint32_t codes[16];
  alignas(16) uint8_t code_bytes[16];

  EncodeTree(const float* boundaries, const uint8_t* rank_codes, int n_levels) {
    float padded[15];
    std::fill(padded, padded + 15, std::numeric_limits<float>::infinity());
    std::copy(boundaries, boundaries + n_levels - 1, padded);
    for (int i = 0; i < 16; ++i) {
      const int rank = (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3;
      level1[i] = padded[7];
      level2[i] = padded[(rank & 8) + 3];
      level3[i] = padded[(rank & 12) + 1];
      level4[i] = padded[rank & 14];
      // Ranks above the last are never reached: their boundaries are infinite.
      codes[i] = code_bytes[i] = rank_codes[std::min(rank, n_levels - 1)];
    }
  }
};

struct QuantizePath {
  // magnitude[b] = largest element of block b with its sign cleared, as storage bits: in every
  // format the order of magnitudes is that of their bits, and NaN and infinity come last.
  void (*absmax)(const void* weight, int64_t n_blocks, int64_t block_size, uint32_t* magnitude);
  // Packs the codes of float(w) * inverse[b]; n_blocks full blocks.
  void (*encode)(const void* weight, int64_t n_blocks, int64_t block_size, const float* inverse,
                 const EncodeTree& tree, uint8_t* codes);
};

QuantizePath quantize_path_portable(DType dtype);
QuantizePath quantize_path_avx2(DType dtype);
QuantizePath quantize_path_avx512(DType dtype);

}  // namespace qlk
