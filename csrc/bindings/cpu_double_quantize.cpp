// torch.ops.qlora_kernels_cpu.double_quantize
#include "qlk/double_quantize.h"
#include "tensor_utils.h"

namespace {

using namespace qlk::bindings;

constexpr const char* kOp = "double_quantize";

void double_quantize(const Tensor& absmax, const Tensor& scale_codebook, int64_t scale_block_size,
                     const Tensor& scale_codes, const Tensor& scale_absmax,
                     const Tensor& scale_offset, int64_t isa) {
  STD_TORCH_CHECK(scale_block_size > 0, kOp, ": scale_block_size must be positive, got ",
                  scale_block_size);
  qlk::DoubleQuantizeParams p;
  p.n_blocks = absmax.numel();
  p.scale_block_size = scale_block_size;
  p.absmax = read_operand<float>(kOp, "absmax", absmax, ScalarType::Float, p.n_blocks);
  p.scale_codebook =
      read_operand<float>(kOp, "scale_codebook", scale_codebook, ScalarType::Float, 256);
  p.scale_codes =
      write_operand<uint8_t>(kOp, "scale_codes", scale_codes, ScalarType::Byte, p.n_blocks);
  p.scale_absmax = write_operand<float>(kOp, "scale_absmax", scale_absmax, ScalarType::Float,
                                        ceil_div(p.n_blocks, scale_block_size));
  p.scale_offset = write_operand<float>(kOp, "scale_offset", scale_offset, ScalarType::Float, 1);
  check_status(kOp, qlk::double_quantize(p, checked_isa(kOp, isa), torch_threads()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def(
      "double_quantize(Tensor absmax, Tensor scale_codebook, int scale_block_size, "
      "Tensor(a!) scale_codes, Tensor(b!) scale_absmax, Tensor(c!) scale_offset, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CPU, m) {
  m.impl("double_quantize", TORCH_BOX(&double_quantize));
}
