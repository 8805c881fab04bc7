// quantized_matmul: y = x Ŵᵀ + bias, and its grad_x = grad_y Ŵ, with no dense copy of Ŵ [N,K]; both
// can add the low-rank term of a LoRA adapter before the one rounding of the result.
#pragma once

#include "qlk/types.h"

namespace qlk {

// Replayable dropout over a row-major [M, cols] tensor (see dropout.h); threshold 0 drops nothing.
struct DropoutMask {
  uint64_t seed = 0;
  uint64_t threshold = 0;   // floor(p * 2^32): an element is kept iff its word is at least this
  float keep_scale = 1.0f;  // fl32(1 / (1 - p))

  bool active() const { return threshold != 0; }
};

// Adds scaling * left · right, [M,rank] times [rank,cols], to a result [M,cols]; the mask, if
// active, applies to the product. `left` holds values already rounded to x's dtype, its rows padded
// with zeros (padded_rank in low_rank.h); `right` is rounded to x's dtype as it is read.
struct LowRankTerm {
  const float* left = nullptr;  // [M, padded rank]
  const void* right = nullptr;  // element (r, j) at r * right_rank_stride + j * right_col_stride
  DType right_dtype = DType::kFloat32;
  int64_t right_rank_stride = 0, right_col_stride = 0;
  int64_t rank = 0;
  float scaling = 1.0f;
  DropoutMask mask;

  bool present() const { return rank > 0; }
};

struct QuantizedMatmulParams {
  QuantizedView weight;           // [N,K]
  const void* x = nullptr;        // forward x [M,K], backward grad_y [M,N]; rows contiguous
  void* y = nullptr;              // forward y [M,N], backward grad_x [M,K]; rows contiguous
  DType dtype = DType::kFloat32;  // of x and y
  int64_t tokens = 0;             // M
  const void* bias = nullptr;     // forward only: [N] in bias_dtype
  DType bias_dtype = DType::kFloat32;
  LowRankTerm low_rank;
};

// Whether the tile path runs a problem: AMX has bf16 products only.
inline bool amx_runs(DType dtype, Isa isa) { return isa == Isa::kAmx && dtype == DType::kBFloat16; }

// y of every path but AMX. A row of y depends on its own row of x alone, bit for bit.
Status quantized_matmul_dot(const QuantizedMatmulParams& params, Isa isa, const ThreadPool& pool);
Status quantized_matmul_amx(const QuantizedMatmulParams& params, const ThreadPool& pool);

// grad_x; the same two paths.
Status quantized_matmul_backward_dot(const QuantizedMatmulParams& params, Isa isa,
                                     const ThreadPool& pool);
Status quantized_matmul_backward_amx(const QuantizedMatmulParams& params, const ThreadPool& pool);

// Decodes rows [row_begin, row_end) x columns [col_begin, col_end) of the weight to fp32 or bf16
// into out [rows, cols] with out_stride elements between rows.
struct DecodePanelParams {
  QuantizedView weight;
  int64_t row_begin = 0, row_end = 0, col_begin = 0, col_end = 0;
  DType dtype = DType::kFloat32;
  void* out = nullptr;
  int64_t out_stride = 0;
};
Status decode_panel(const DecodePanelParams& params, Isa isa, const ThreadPool& pool);

}  // namespace qlk
