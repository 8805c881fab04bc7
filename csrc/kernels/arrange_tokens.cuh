// What quantized_matmul_sm90.cu multiplies the weight with, in the order of its products: x and the
// adapter's xa in chunks of 64 columns, each with 128 bytes for each token, so that a chunk of
// neighbouring tokens is one piece of memory that a bulk copy brings as it is.
//
// Of a chunk of x, column 16 q + 4 s + 2 h + e is at place 16 s + 8 h + 2 q + e: then lane q of a
// quad, whose operands of product s are places 8 h + 2 q + e, owns 16 neighbouring columns of the
// weight. A chunk of xa is in order. 16 bytes number p of a token are at number p ^ (token % 8),
// the 128-byte swizzle of wgmma's operands.
#pragma once

#include "qlk/cuda/launch_sm90.h"
#include "qlk/cuda/ptx_sm90.cuh"

namespace qlk {

constexpr int kArrangeThreads = 256, kPieces = 8;  // of 16 bytes, in a token's chunk

// A thread per 16 bytes of the result; places without a column or token become zeros.
__global__ __launch_bounds__(kArrangeThreads) void arrange_tokens_kernel(
    const __grid_constant__ cuda::FusedMatmulParams p, void* arranged, int64_t padded_tokens) {
  ptx::launch_dependents();
  const int64_t index = int64_t{blockIdx.x} * kArrangeThreads + threadIdx.x;
  const int piece = static_cast<int>(index % kPieces);
  const int64_t chunk = index / kPieces / padded_tokens;
  const int64_t token = index / kPieces - chunk * padded_tokens;
  const int64_t x_chunks = p.weight.cols / 64;
  if (chunk >= x_chunks + ceil_div(p.rank, int64_t{64})) return;
  uint32_t pairs[4] = {};
  if (token < p.tokens && chunk < x_chunks) {
    const auto* row = static_cast<const uint32_t*>(p.x) + (token * p.weight.cols + chunk * 64) / 2;
#pragma unroll
    for (int q = 0; q < 4; ++q) pairs[q] = row[8 * q + piece];
  } else if (token < p.tokens) {
    const auto* row = static_cast<const uint16_t*>(p.xa) + token * p.xa_stride;
    const int64_t column = (chunk - x_chunks) * 64 + piece * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < p.rank) pairs[i / 2] |= uint32_t{row[column + i]} << (16 * (i % 2));
  }
  auto* out = static_cast<uint4*>(arranged) + (chunk * padded_tokens + token) * kPieces;
  ptx::store_global(out + (piece ^ static_cast<int>(token % 8)),
                    make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
}

inline cudaError_t arrange_tokens(const cuda::FusedMatmulParams& p, void* arranged,
                                  int64_t padded_tokens, cudaStream_t stream) {
  const int64_t chunks = p.weight.cols / 64 + ceil_div(p.rank, int64_t{64});
  const int64_t blocks = ceil_div(chunks * padded_tokens * kPieces, int64_t{kArrangeThreads});
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  return launch(arrange_tokens_kernel, dim3{static_cast<unsigned>(blocks), 1, 1},
                dim3{kArrangeThreads, 1, 1}, 0, stream, p, arranged, padded_tokens);
}

}  // namespace qlk
