// torch.ops.qlora_kernels_cpu.quantized_matmul, quantized_matmul_backward_input and decode_panel
#include "matmul_utils.h"
#include "qlk/quantized_matmul.h"

namespace {

using namespace qlk::bindings;

void quantized_matmul(const Tensor& x, QLK_WEIGHT_PARAMETERS, const OptionalTensor& bias,
                      const Tensor& y, bool tiles, int64_t isa) {
  constexpr const char* kOp = "quantized_matmul";
  qlk::QuantizedMatmulParams p;
  p.weight = quantized_view(kOp, QLK_WEIGHT_ARGUMENTS);
  set_operands(kOp, "x", x, cols, "y", y, rows, &p);
  set_bias(kOp, bias, rows, &p);
  check_status(kOp, run_forward(p, tiles, checked_isa(kOp, isa)));
}

void quantized_matmul_backward_input(const Tensor& grad_y, QLK_WEIGHT_PARAMETERS,
                                     const Tensor& grad_x, bool tiles, int64_t isa) {
  constexpr const char* kOp = "quantized_matmul_backward_input";
  qlk::QuantizedMatmulParams p;
  p.weight = quantized_view(kOp, QLK_WEIGHT_ARGUMENTS);
  set_operands(kOp, "grad_y", grad_y, rows, "grad_x", grad_x, cols, &p);
  check_status(kOp, run_backward(p, tiles, checked_isa(kOp, isa)));
}

// Rows [row_begin, row_begin + out rows) and columns [col_begin, col_begin + out columns).
void decode_panel(QLK_WEIGHT_PARAMETERS, int64_t row_begin, int64_t col_begin, const Tensor& out,
                  int64_t isa) {
  constexpr const char* kOp = "decode_panel";
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.is_contiguous(), kOp,
                  ": out must be a contiguous 2-D CPU tensor");
  const int64_t out_rows = out.size(0), out_cols = out.size(1);
  STD_TORCH_CHECK(row_begin >= 0 && row_begin + out_rows <= rows && col_begin >= 0 &&
                      col_begin + out_cols <= cols,
                  kOp, ": out must lie in [", rows, ", ", cols, "], got rows from ", row_begin,
                  ", columns from ", col_begin, " and size [", out_rows, ", ", out_cols, "]");
  qlk::DecodePanelParams p;
  p.weight = quantized_view(kOp, QLK_WEIGHT_ARGUMENTS);
  p.row_begin = row_begin;
  p.row_end = row_begin + out_rows;
  p.col_begin = col_begin;
  p.col_end = col_begin + out_cols;
  p.dtype = float_dtype(kOp, "out", out);
  p.out = out.mutable_data_ptr();
  p.out_stride = out_cols;
  check_status(kOp, qlk::decode_panel(p, checked_isa(kOp, isa), torch_threads()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def("quantized_matmul(Tensor x, " QLK_WEIGHT_SCHEMA
        ", Tensor? bias, Tensor(a!) y, bool tiles, int isa) -> ()");
  m.def("quantized_matmul_backward_input(Tensor grad_y, " QLK_WEIGHT_SCHEMA
        ", Tensor(a!) grad_x, bool tiles, int isa) -> ()");
  m.def("decode_panel(" QLK_WEIGHT_SCHEMA
        ", int row_begin, int col_begin, Tensor(a!) out, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CPU, m) {
  m.impl("quantized_matmul", TORCH_BOX(&quantized_matmul));
  m.impl("quantized_matmul_backward_input", TORCH_BOX(&quantized_matmul_backward_input));
  m.impl("decode_panel", TORCH_BOX(&decode_panel));
}
