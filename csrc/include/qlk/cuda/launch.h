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
constexpr int kMaxMatrices = 16;

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
  const void* xa = nullptr;  // [M,R], rows xa_stride elements apart
  int64_t xa_stride = 0;
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
  // The kernel that writes xa is the last one launched in the stream, all that this one reads
  // besides was written before that one started: from sm_90 on this one starts before it has ended.
  bool overlaps = false;
};

// A weight whose rows are whole 64-element chunks, each with one scale.
inline bool fused_matmul_runs(int64_t cols, int64_t block_size) {
  return cols > 0 && cols % 64 == 0 && block_size >= 64;
}

constexpr int64_t kFusedTileN = 128, kFusedTileK = 128, kFusedMaxTokens = 32;
// What the kernel counts in 32 bits: columns and tokens; elements, whose scales it finds by the
// number of their 64; rows, as a grid's second dimension ends at 65535.
constexpr int64_t kFusedLargest = int64_t{1} << 30, kFusedMostElements = int64_t{1} << 37;
constexpr int64_t kFusedMostRows = 65535 * kFusedTileN;

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

// Both, the projection first: its result is what the product reads as xa, or holds it. On sm_90 the
// product reads its weights meanwhile.
int launch_projected_matmul(const DownProjectionParams& projection, const FusedMatmulParams& matmul,
                            void* stream);

// Products that sum over tokens or over `data`'s columns, left as partial sums: gradient [C,R] =
// dataᵀ left, if left is given, and in the same pass over data u [M,R] = data · right, if that is.
// fp32 sums of products of fp16 or bf16; neither scaled nor rounded.
struct LowRankGradientParams {
  const void* data = nullptr;              // [M,C] contiguous: grad_y, or x
  const void* left = nullptr;              // [M,R] contiguous: xa, or u; or null
  DType dtype = DType::kBFloat16;          // of data and left: fp16 or bf16
  int64_t tokens = 0, cols = 0, rank = 0;  // M, C, R; C * R and M * R below 2^31
  // Blocks that share the gradient of a column, each with its part of the tokens.
  int token_slices = 1;
  float* gradient_partials = nullptr;  // [token_slices, C, R]; rank_major: [token_slices, R, C]
  bool rank_major = false;
  // lora_b [C,R], or right_rank_major: lora_a [R,C], of right_dtype, rounded to dtype as it is
  // read; or null.
  const void* right = nullptr;
  DType right_dtype = DType::kFloat32;
  bool right_rank_major = false;
  float* u_partials = nullptr;  // [low_rank_u_parts(C, R, left != nullptr), M, R]
  // data once more: [M,C] with copy_stride elements between rows; or null. Then C, copy_stride and
  // both pointers are multiples of a vector.
  void* copy = nullptr;
  int64_t copy_stride = 0;
};

constexpr int64_t kGradientTokens = 16;

// Ranks that a block takes in its one pass over data; more of them are shared by several blocks.
inline int64_t low_rank_gradient_ranks(int64_t rank) {
  return rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
}

// Columns of a block's tile: both products of 64 ranks fill its registers with half of them.
constexpr int64_t low_rank_gradient_tile(int64_t ranks, bool both) {
  return ranks == 64 && both ? 256 : 512;
}

// Slices of the columns, each with its partial sum of u.
inline int64_t low_rank_u_parts(int64_t cols, int64_t rank, bool with_gradient) {
  const int64_t tile = low_rank_gradient_tile(low_rank_gradient_ranks(rank), with_gradient);
  return (cols + tile - 1) / tile;
}

int launch_low_rank_gradient(const LowRankGradientParams& params, void* stream);

// out [rows, cols] = scaling * the sum of `parts` partial sums in their order, one rounding.
struct PartialSums {
  const float* partials = nullptr;  // [parts, rows, cols]
  int64_t parts = 0, rows = 0, cols = 0;
  float scaling = 1.0f;
  void* out = nullptr;  // [rows, cols] contiguous
  DType dtype = DType::kFloat32;
  // The result once more at tail + row * tail_stride, with zeros up to column tail_cols; or null.
  void* tail = nullptr;
  int64_t tail_stride = 0, tail_cols = 0;
};

constexpr int kMaxPartialSums = 2;

// Up to kMaxPartialSums of them in one launch; rows * max(cols, tail_cols) below 2^31.
int launch_partial_sums(const PartialSums* sums, int count, void* stream);

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
