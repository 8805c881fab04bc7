// The launchers of csrc/kernels, as the bindings see them: no CUDA header is needed here.
//
// All pointers in the parameters are device pointers of the current device, `stream` is a
// cudaStream_t. A launcher returns a cudaError_t, 0 if the work is queued.
#pragma once

#include <cstdint>

#include "qlk/dequantize.h"
#include "qlk/double_quantize.h"
#include "qlk/quantize.h"

namespace qlk::cuda {

// cudaGetErrorString.
const char* error_text(int status);

// `codes` is aligned to 4 bytes.
int launch_quantize(const QuantizeParams& params, void* stream);

// Bins of one partial sum of double_quantize, and the most partial sums.
constexpr int64_t kSumBins = 12, kMaxSumParts = 128;

// partials: scratch, int64 [kMaxSumParts * kSumBins]. n_blocks > 0.
int launch_double_quantize(const DoubleQuantizeParams& params, int64_t* partials, void* stream);

// Matrices of one launch, all of one out dtype.
constexpr int kMaxMatrices = 8;

int launch_dequantize(const DequantizeParams* matrices, int count, void* stream);

// y [M,N] = x Ŵᵀ + scaling * xa lora_bᵀ + bias, all summed in fp32, one rounding; for few tokens.
struct FusedMatmulParams {
  QuantizedView weight;            // [N,K], see fused_matmul_runs; scale_block_size a power of two
  const void* x = nullptr;         // [M,K] at a 16-byte boundary
  void* y = nullptr;               // [M,N]
  DType dtype = DType::kBFloat16;  // of x, y and xa: fp16 or bf16
  int64_t tokens = 0;              // M
  const void* bias = nullptr;      // [N] of bias_dtype, or null
  DType bias_dtype = DType::kFloat32;
  const void* xa = nullptr;      // [M,R]
  const void* lora_b = nullptr;  // [N,R] of lora_b_dtype, rounded to dtype as it is read
  DType lora_b_dtype = DType::kFloat32;
  int64_t rank = 0;  // R; 0: no adapter
  float scaling = 1.0f;
  // Blocks that share an output tile, each with its part of K. A token's bits depend on it, and not
  // on M. Above 1: scratch of fused_matmul_partials floats, and a zero for each of
  // fused_matmul_tiles tiles, which is zero again afterwards.
  int splits = 1;
  float* partials = nullptr;
  uint32_t* tickets = nullptr;
};

// A weight whose rows are whole 64-element chunks, each with one scale.
inline bool fused_matmul_runs(int64_t cols, int64_t block_size) {
  return cols > 0 && cols % 64 == 0 && block_size >= 64;
}

constexpr int64_t kFusedTileN = 128, kFusedTileK = 128, kFusedMaxTokens = 32;

// Token columns of a block's tile: 8, 16 or 32.
inline int64_t fused_matmul_tokens(int64_t tokens) {
  int64_t columns = 8;
  while (columns < tokens && columns < kFusedMaxTokens) columns *= 2;
  return columns;
}

inline int64_t fused_matmul_tiles(int64_t tokens, int64_t out_features) {
  const int64_t columns = fused_matmul_tokens(tokens);
  return (tokens + columns - 1) / columns * ((out_features + kFusedTileN - 1) / kFusedTileN);
}

inline int64_t fused_matmul_partials(int64_t tokens, int64_t out_features, int64_t splits) {
  return fused_matmul_tiles(tokens, out_features) * splits * kFusedTileN *
         fused_matmul_tokens(tokens);
}

int launch_fused_matmul(const FusedMatmulParams& params, void* stream);

// result [M,R] = x [M,K] · adapterᵀ [R,K], summed in fp32 in an order that does not depend on M,
// and rounded to x's dtype.
struct DownProjectionParams {
  const void* x = nullptr;
  DType dtype = DType::kBFloat16;  // of x and the result: fp16 or bf16
  const void* adapter = nullptr;
  DType adapter_dtype = DType::kFloat32;  // rounded to dtype as it is read
  int64_t tokens = 0, cols = 0, rank = 0;
  void* result = nullptr;
};

int launch_down_projection(const DownProjectionParams& params, void* stream);

// out = x with dropped elements 0 and the kept ones times keep_scale; see qlk/dropout.h.
struct DropoutParams {
  const void* x = nullptr;
  void* out = nullptr;
  DType dtype = DType::kFloat32;  // of x and out
  int64_t numel = 0;
  const int64_t* seed = nullptr;  // [1], on the device
  uint64_t threshold = 0;         // floor(p * 2^32)
  float keep_scale = 1.0f;        // fl32(1 / (1 - p))
};

int launch_dropout(const DropoutParams& params, void* stream);

}  // namespace qlk::cuda
