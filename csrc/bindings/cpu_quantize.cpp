// torch.ops.qlora_kernels_cpu.quantize
#include "qlk/quantize.h"
#include "tensor_utils.h"

namespace {

using namespace qlk::bindings;

constexpr const char* kOp = "quantize";

void quantize(const Tensor& weight, const Tensor& boundaries, const Tensor& rank_codes,
              int64_t zero_code, int64_t block_size, const OptionalTensor& scales,
              const Tensor& codes, const Tensor& absmax, int64_t isa) {
  check_block_size(kOp, block_size);
  qlk::QuantizeParams p;
  p.dtype = float_dtype(kOp, "weight", weight);
  p.numel = weight.numel();
  p.block_size = block_size;
  p.weight = read_operand<void>(kOp, "weight", weight, weight.scalar_type(), p.numel);

  const int64_t n_levels = rank_codes.numel(), n_blocks = ceil_div(p.numel, block_size);
  STD_TORCH_CHECK(n_levels >= 2 && n_levels <= 16, kOp,
                  ": rank_codes must have 2 to 16 elements, got ", n_levels);
  STD_TORCH_CHECK(zero_code >= 0 && zero_code < 16, kOp, ": zero_code must be in 0 ... 15, got ",
                  zero_code);
  p.n_levels = static_cast<int32_t>(n_levels);
  p.rank_codes = read_operand<uint8_t>(kOp, "rank_codes", rank_codes, ScalarType::Byte, n_levels);
  p.zero_code = static_cast<uint8_t>(zero_code);
  if (scales) {
    p.scales = read_operand<float>(kOp, "scales", *scales, ScalarType::Float, n_blocks);
    p.midpoints = read_operand<double>(kOp, "boundaries (with scales)", boundaries,
                                       ScalarType::Double, n_levels - 1);
  } else {
    p.boundaries =
        read_operand<float>(kOp, "boundaries", boundaries, ScalarType::Float, n_levels - 1);
  }
  p.codes = write_operand<uint8_t>(kOp, "codes", codes, ScalarType::Byte, ceil_div(p.numel, 2));
  p.absmax = write_operand<float>(kOp, "absmax", absmax, ScalarType::Float, n_blocks);
  check_status(kOp, qlk::quantize(p, checked_isa(kOp, isa), torch_threads()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def(
      "quantize(Tensor weight, Tensor boundaries, Tensor rank_codes, int zero_code, "
      "int block_size, Tensor? scales, Tensor(a!) codes, Tensor(b!) absmax, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }
