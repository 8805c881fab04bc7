// torch.ops.qlora_kernels_cpu.dropout
#include "qlk/dropout.h"
#include "tensor_utils.h"

namespace {

using namespace qlk::bindings;

void dropout(const Tensor& x, double dropout_p, const Tensor& seed, const Tensor& out,
             int64_t isa) {
  constexpr const char* kOp = "dropout";
  const auto* bits = read_operand<int64_t>(kOp, "seed", seed, ScalarType::Long, 1);
  const qlk::DType dtype = float_dtype(kOp, "x", x);
  check_operand(kOp, "x", x, x.scalar_type(), x.numel());
  check_operand(kOp, "out", out, x.scalar_type(), x.numel());
  qlk::dropout(qlk::dropout_mask(dropout_p, *bits), x.const_data_ptr(), dtype, x.numel(),
               checked_isa(kOp, isa), torch_threads(), out.mutable_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def("dropout(Tensor x, float dropout_p, Tensor seed, Tensor(a!) out, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }
