// torch.ops.qlora_kernels_cpu.dequantize
#include "qlk/dequantize.h"
#include "tensor_utils.h"

namespace {

using namespace qlk::bindings;

constexpr const char* kOp = "dequantize";

// `out` is [rows, cols] with unit stride along a row; `fresh`: nobody has written to it yet.
void dequantize(QLK_WEIGHT_PARAMETERS, const Tensor& out, bool fresh, int64_t isa) {
  qlk::DequantizeParams p;
  p.weight = quantized_view(kOp, QLK_WEIGHT_ARGUMENTS);
  p.fresh = fresh;
  p.dtype = float_dtype(kOp, "out", out);
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.size(0) == rows && out.size(1) == cols, kOp,
                  ": out must be a CPU tensor [", rows, ", ", cols, "]");
  if (rows == 0 || cols == 0) return;
  p.row_stride = rows == 1 ? cols : out.stride(0);
  STD_TORCH_CHECK((cols == 1 || out.stride(1) == 1) && p.row_stride >= cols, kOp,
                  ": out must have rows of unit stride that do not overlap, got strides (",
                  out.stride(0), ", ", out.stride(1), ")");
  p.out = out.mutable_data_ptr();
  check_status(kOp, qlk::dequantize(p, checked_isa(kOp, isa), torch_threads()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def("dequantize(" QLK_WEIGHT_SCHEMA ", Tensor(a!) out, bool fresh, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
}
