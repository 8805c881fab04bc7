// What the bindings that take a LoRA adapter share.
#pragma once

#include "matmul_utils.h"
#include "qlk/low_rank.h"
#include "qlk/scratch.h"

namespace qlk::bindings {

// lora_a [R, K] and lora_b [N, R].
inline AdapterView view_of_a(const char* op, const Tensor& lora_a, int64_t cols) {
  const DType dtype = float_dtype(op, "lora_a", lora_a);
  const int64_t rank = check_rows(op, "lora_a", lora_a, cols);
  return {lora_a.const_data_ptr(), dtype, rank, cols, cols, 1};
}

inline AdapterView view_of_b(const char* op, const Tensor& lora_b, int64_t rows, int64_t rank) {
  const DType dtype = float_dtype(op, "lora_b", lora_b);
  STD_TORCH_CHECK(check_rows(op, "lora_b", lora_b, rank) == rows, op, ": lora_b must have ", rows,
                  " rows, got ", lora_b.size(0));
  return {lora_b.const_data_ptr(), dtype, rank, rows, 1, rank};
}

inline void set_low_rank(const AdapterView& right, const float* left, float scaling,
                         QuantizedMatmulParams* p) {
  p->low_rank.left = left;
  p->low_rank.right = right.data;
  p->low_rank.right_dtype = right.dtype;
  p->low_rank.right_rank_stride = right.rank_stride;
  p->low_rank.right_col_stride = right.col_stride;
  p->low_rank.rank = right.rank;
  p->low_rank.scaling = scaling;
}

// left = scaling * x · adapterᵀ and scaling * leftᵀ x, on tiles where the product with the weight
// is.
inline void project(const char* op, const void* x, DType dtype, int64_t tokens,
                    const AdapterView& adapter, float scaling, bool tiles, Isa isa, float* left) {
  check_status(
      op, tiles && amx_runs(dtype, isa)
              ? down_projection_amx(x, tokens, adapter, scaling, torch_threads(), left)
              : down_projection(x, dtype, tokens, adapter, scaling, isa, torch_threads(), left));
}

inline void sum_gradient(const char* op, const float* left, const void* x, DType dtype,
                         int64_t tokens, float scaling, const AdapterView& gradient, bool tiles,
                         Isa isa) {
  check_status(
      op, tiles && amx_runs(dtype, isa)
              ? adapter_gradient_amx(left, x, tokens, scaling, gradient, torch_threads())
              : adapter_gradient(left, x, dtype, tokens, scaling, gradient, isa, torch_threads()));
}

inline float* left_scratch(const char* op, int64_t tokens, int64_t rank) {
  static thread_local Scratch memory;
  void* left = memory.reserve(tokens * padded_rank(rank) * static_cast<int64_t>(sizeof(float)));
  STD_TORCH_CHECK(left || tokens * rank == 0, op, ": out of memory for scratch");
  return static_cast<float*>(left);
}

}  // namespace qlk::bindings
