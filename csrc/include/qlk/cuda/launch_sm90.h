// The fused matmul of a Hopper GPU for tens to hundreds of tokens, as its binding sees it; see
// qlk/cuda/launch.h.
#pragma once

#include "qlk/cuda/launch.h"

namespace qlk::cuda {

constexpr int64_t kWgmmaTileK = 256;

struct WgmmaMatmulParams {
  // All but splits. Its partials are wgmma_matmul_partials floats and its tickets
  // wgmma_matmul_tickets zeros, which are zero again afterwards.
  FusedMatmulParams operands;
  // A block's tile of y: 128 or 256 rows of the weight by 32, 64 or 128 tokens.
  int tile_rows = 128, tile_tokens = 64;
  // They share the work of all tiles out evenly, 256 columns of one tile being the least.
  int blocks = 1;
  void* arranged = nullptr;  // scratch of wgmma_matmul_arranged elements, at a 16-byte boundary
};

// Tiles that are compiled.
inline bool wgmma_matmul_runs(int64_t tile_rows, int64_t tile_tokens) {
  return (tile_rows == 128 || tile_rows == 256) &&
         (tile_tokens == 32 || tile_tokens == 64 || tile_tokens == 128);
}

// The operands in the order of the products: chunks of 64 columns, those of x and then those of
// xa, each with 128 bytes for each of the padded tokens.
inline int64_t wgmma_matmul_arranged(int64_t tokens, int64_t cols, int64_t rank,
                                     int64_t tile_tokens) {
  const int64_t padded = (tokens + tile_tokens - 1) / tile_tokens * tile_tokens;
  return (cols / 64 + (rank + 63) / 64) * padded * 64;
}

inline int64_t wgmma_matmul_tiles(int64_t tokens, int64_t out_features, int64_t tile_rows,
                                  int64_t tile_tokens) {
  return (tokens + tile_tokens - 1) / tile_tokens * ((out_features + tile_rows - 1) / tile_rows);
}

// Each half of a block's rows has a ticket of its own.
inline int64_t wgmma_matmul_tickets(int64_t tokens, int64_t out_features, int64_t tile_rows,
                                    int64_t tile_tokens) {
  return 2 * wgmma_matmul_tiles(tokens, out_features, tile_rows, tile_tokens);
}

// A block begins at most one tile that others end, and ends one that others began.
inline int64_t wgmma_matmul_partials(int64_t blocks, int64_t tile_rows, int64_t tile_tokens) {
  return 2 * blocks * tile_rows * tile_tokens;
}

// Compute capability 9.0 only. Two launches: x and xa are arranged, then multiplied.
int launch_wgmma_matmul(const WgmmaMatmulParams& params, void* stream);

}  // namespace qlk::cuda
