// LoRA's products: the down-projection, the up-projection added to a result, and both adapter
// gradients, in fp32 with fixed orders of addition.
#pragma once

#include "qlk/quantized_matmul.h"

namespace qlk {

// Rows of `LowRankTerm::left` are padded with zeros to this many floats.
inline int64_t padded_rank(int64_t rank) { return (rank + 3) / 4 * 4; }

// A matrix with one contiguous axis: element (r, j) at r * rank_stride + j * col_stride.
struct AdapterView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rank = 0, cols = 0;
  int64_t rank_stride = 0, col_stride = 0;
};

// Columns [col_begin, col_begin + cols) of `adapter`, rounded to dtype, at tile [padded rank][cols]
// with tile_stride floats between ranks; the padding is zero.
void load_adapter_tile(const AdapterView& adapter, DType dtype, int64_t col_begin, int64_t cols,
                       int64_t tile_stride, Isa isa, float* tile);

// left[t] = scaling * (x[t] · adapterᵀ), [tokens, padded rank]: x [tokens, cols] of dtype, the
// result rounded to dtype. A token's bits do not depend on the other tokens.
Status down_projection(const void* x, DType dtype, int64_t tokens, const AdapterView& adapter,
                       float scaling, Isa isa, const ThreadPool& pool, float* left);

// out[t * out_stride + j] += scaling * (left[token_begin + t] · tile column j), masked; the columns
// begin at col_begin of a result of result_cols. `products` is scratch of tokens * cols floats.
void add_low_rank(const LowRankTerm& term, int64_t token_begin, int64_t tokens, int64_t col_begin,
                  int64_t cols, int64_t result_cols, const float* tile, Isa isa, float* products,
                  float* out, int64_t out_stride);

// gradient (r, j) = scaling * sum over tokens of left[t, r] * x[t, j]; x [tokens, cols] of dtype,
// left [tokens, padded rank]. The view says where the gradient goes and in which dtype. For few
// tokens: they are summed in one chain.
Status adapter_gradient(const float* left, const void* x, DType dtype, int64_t tokens,
                        float scaling, const AdapterView& gradient, Isa isa,
                        const ThreadPool& pool);

// The same two on AMX tiles, for bf16 x: amx_runs. The products are exact and summed in fp32, in
// another order than above; a token's bits do not depend on the other tokens here either.
Status down_projection_amx(const void* x, int64_t tokens, const AdapterView& adapter, float scaling,
                           const ThreadPool& pool, float* left);
Status adapter_gradient_amx(const float* left, const void* x, int64_t tokens, float scaling,
                            const AdapterView& gradient, const ThreadPool& pool);

}  // namespace qlk
