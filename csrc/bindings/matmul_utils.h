// What the bindings of quantized_matmul and qlora_linear share.
#pragma once

#include <algorithm>

#include "qlk/quantized_matmul.h"
#include "tensor_utils.h"

namespace qlk::bindings {

// A contiguous [tokens, cols] CPU tensor; returns tokens.
inline int64_t check_rows(const char* op, const char* name, const Tensor& tensor, int64_t cols) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 2 && tensor.is_contiguous() && tensor.size(1) == cols, op,
      ": ", name, " must be a contiguous CPU tensor [tokens, ", cols, "]");
  return tensor.size(0);
}

// x [M, x_cols] and y [M, y_cols] of one dtype.
inline void set_operands(const char* op, const char* x_name, const Tensor& x, int64_t x_cols,
                         const char* y_name, const Tensor& y, int64_t y_cols,
                         QuantizedMatmulParams* p) {
  p->dtype = float_dtype(op, x_name, x);
  p->tokens = check_rows(op, x_name, x, x_cols);
  STD_TORCH_CHECK(check_rows(op, y_name, y, y_cols) == p->tokens, op, ": ", y_name, " must have ",
                  p->tokens, " rows, got ", y.size(0));
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), op, ": ", y_name, " must be ",
                  dtype_name(x.scalar_type()), ", got ", dtype_name(y.scalar_type()));
  p->x = x.const_data_ptr();
  p->y = y.mutable_data_ptr();
}

inline void set_bias(const char* op, const OptionalTensor& bias, int64_t out_features,
                     QuantizedMatmulParams* p) {
  if (!bias) return;
  p->bias_dtype = float_dtype(op, "bias", *bias);
  check_operand(op, "bias", *bias, bias->scalar_type(), out_features);
  p->bias = bias->const_data_ptr();
}

inline Status run_forward(const QuantizedMatmulParams& p, bool tiles, Isa isa) {
  if (p.tokens == 0 || p.weight.rows == 0) return Status::kOk;
  // An empty sum needs no tiles.
  if (tiles && amx_runs(p.dtype, isa) && p.weight.cols > 0)
    return quantized_matmul_amx(p, torch_threads());
  return quantized_matmul_dot(p, isa, torch_threads());
}

inline Status run_backward(const QuantizedMatmulParams& p, bool tiles, Isa isa) {
  if (p.tokens == 0 || p.weight.cols == 0) return Status::kOk;
  if (tiles && amx_runs(p.dtype, isa) && p.weight.rows > 0)
    return quantized_matmul_backward_amx(p, torch_threads());
  return quantized_matmul_backward_dot(p, isa, torch_threads());
}

}  // namespace qlk::bindings
