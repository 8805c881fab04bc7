// torch.ops.qlora_kernels_cpu.quantize_blockwise and dequantize_blockwise
#include "qlk/blockwise.h"
#include "tensor_utils.h"

namespace {

using namespace qlk::bindings;

qlk::BlockwiseParams params_of(const char* op, const Tensor& values, const Tensor& codebook,
                               int64_t block_size) {
  STD_TORCH_CHECK(block_size > 0, op, ": block_size must be positive, got ", block_size);
  qlk::BlockwiseParams p;
  p.dtype = float_dtype(op, "values", values);
  p.numel = values.numel();
  p.block_size = block_size;
  p.codebook = read_operand<float>(op, "codebook", codebook, ScalarType::Float, 256);
  return p;
}

void quantize_blockwise(const Tensor& values, const Tensor& codebook, int64_t block_size,
                        const Tensor& codes, const Tensor& absmax, int64_t isa) {
  constexpr const char* kOp = "quantize_blockwise";
  const qlk::BlockwiseParams p = params_of(kOp, values, codebook, block_size);
  qlk::quantize_blockwise(
      p, read_operand<void>(kOp, "values", values, values.scalar_type(), p.numel),
      write_operand<uint8_t>(kOp, "codes", codes, ScalarType::Byte, p.numel),
      write_operand<float>(kOp, "absmax", absmax, ScalarType::Float, ceil_div(p.numel, block_size)),
      checked_isa(kOp, isa), torch_threads());
}

void dequantize_blockwise(const Tensor& codes, const Tensor& absmax, const Tensor& codebook,
                          int64_t block_size, const Tensor& values, int64_t isa) {
  constexpr const char* kOp = "dequantize_blockwise";
  const qlk::BlockwiseParams p = params_of(kOp, values, codebook, block_size);
  qlk::dequantize_blockwise(
      p, read_operand<uint8_t>(kOp, "codes", codes, ScalarType::Byte, p.numel),
      read_operand<float>(kOp, "absmax", absmax, ScalarType::Float, ceil_div(p.numel, block_size)),
      write_operand<void>(kOp, "values", values, values.scalar_type(), p.numel),
      checked_isa(kOp, isa), torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def(
      "quantize_blockwise(Tensor values, Tensor codebook, int block_size, Tensor(a!) codes, "
      "Tensor(b!) absmax, int isa) -> ()");
  m.def(
      "dequantize_blockwise(Tensor codes, Tensor absmax, Tensor codebook, int block_size, "
      "Tensor(a!) values, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CPU, m) {
  m.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise));
}
