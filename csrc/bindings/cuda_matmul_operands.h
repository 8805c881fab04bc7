// What the bindings of the CUDA matmuls share.
#pragma once

#include "cuda_utils.h"

namespace qlk::bindings {

// A contiguous [rows, cols] CUDA tensor; returns rows.
inline int64_t check_matrix(const char* op, const char* name, const Tensor& tensor, int64_t cols) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.dim() == 2 && tensor.is_contiguous() && tensor.size(1) == cols, op,
      ": ", name, " must be a contiguous CUDA tensor [rows, ", cols, "]");
  return tensor.size(0);
}

// The checked operands of y [M,N] = x [M,K] Ŵᵀ + scaling·xa lora_bᵀ + bias; `xa` [M,R] and `lora_b`
// [N,R] come together or not at all. Scratch and the launch's own numbers are not set.
inline cuda::FusedMatmulParams matmul_operands(const char* op, const Tensor& x,
                                               QLK_WEIGHT_PARAMETERS, const OptionalTensor& bias,
                                               const OptionalTensor& xa,
                                               const OptionalTensor& lora_b, double scaling,
                                               const Tensor& y) {
  cuda::FusedMatmulParams p;
  p.weight = quantized_view(op, QLK_WEIGHT_ARGUMENTS, Place::kCuda);
  p.dtype = float_dtype(op, "x", x);
  p.tokens = check_matrix(op, "x", x, cols);
  STD_TORCH_CHECK(check_matrix(op, "y", y, rows) == p.tokens, op, ": y must have ", p.tokens,
                  " rows, got ", y.size(0));
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), op, ": y must be of x's dtype");
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (bias) {
    p.bias_dtype = float_dtype(op, "bias", *bias);
    p.bias = read_cuda<void>(op, "bias", *bias, bias->scalar_type(), rows);
  }
  STD_TORCH_CHECK(xa.has_value() == lora_b.has_value(), op, ": xa and lora_b come together");
  if (xa) {
    p.lora_b_dtype = float_dtype(op, "lora_b", *lora_b);
    p.rank = xa->dim() == 2 ? xa->size(1) : 0;
    p.xa_stride = xa->dim() == 2 && p.tokens > 1 ? xa->stride(0) : p.rank;
    // Columns of a wider matrix: the products of several adapters stand side by side.
    STD_TORCH_CHECK(xa->is_cuda() && xa->scalar_type() == x.scalar_type() && xa->dim() == 2 &&
                        xa->size(0) == p.tokens && (p.rank <= 1 || xa->stride(1) == 1) &&
                        p.xa_stride >= p.rank,
                    op, ": xa must be [", p.tokens, ", R] of x's dtype, with rows of unit stride");
    p.xa = xa->const_data_ptr();
    p.lora_b = read_cuda<void>(op, "lora_b", *lora_b, lora_b->scalar_type(), rows * p.rank);
    p.scaling = static_cast<float>(scaling);
  }
  return p;
}

}  // namespace qlk::bindings
