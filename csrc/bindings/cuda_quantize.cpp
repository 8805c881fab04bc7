// torch.ops.qlora_kernels_cuda.quantize and double_quantize
#include "cuda_utils.h"

namespace {

using namespace qlk::bindings;

void quantize(const Tensor& weight, const Tensor& boundaries, const Tensor& rank_codes,
              int64_t zero_code, int64_t block_size, const OptionalTensor& scales,
              const Tensor& codes, const Tensor& absmax, int64_t stream) {
  constexpr const char* kOp = "quantize";
  check_block_size(kOp, block_size, Place::kCuda);
  qlk::QuantizeParams p;
  p.dtype = float_dtype(kOp, "weight", weight);
  p.numel = weight.numel();
  p.block_size = block_size;
  p.weight = read_cuda<void>(kOp, "weight", weight, weight.scalar_type(), p.numel);

  const int64_t n_levels = rank_codes.numel(), n_blocks = ceil_div(p.numel, block_size);
  STD_TORCH_CHECK(n_levels >= 2 && n_levels <= 16, kOp,
                  ": rank_codes must have 2 to 16 elements, got ", n_levels);
  STD_TORCH_CHECK(zero_code >= 0 && zero_code < 16, kOp, ": zero_code must be in 0 ... 15, got ",
                  zero_code);
  p.n_levels = static_cast<int32_t>(n_levels);
  p.rank_codes = read_cuda<uint8_t>(kOp, "rank_codes", rank_codes, ScalarType::Byte, n_levels);
  p.zero_code = static_cast<uint8_t>(zero_code);
  if (scales) {
    p.scales = read_cuda<float>(kOp, "scales", *scales, ScalarType::Float, n_blocks);
    p.midpoints = read_cuda<double>(kOp, "boundaries (with scales)", boundaries, ScalarType::Double,
                                    n_levels - 1);
  } else {
    p.boundaries = read_cuda<float>(kOp, "boundaries", boundaries, ScalarType::Float, n_levels - 1);
  }
  p.codes = write_cuda<uint8_t>(kOp, "codes", codes, ScalarType::Byte, ceil_div(p.numel, 2));
  p.absmax = write_cuda<float>(kOp, "absmax", absmax, ScalarType::Float, n_blocks);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.codes) % 4 == 0, kOp,
                  ": codes must be aligned to 4 bytes");
  const DeviceGuard guard(weight.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_quantize(p, stream_pointer(stream)));
}

void double_quantize(const Tensor& absmax, const Tensor& scale_codebook, int64_t scale_block_size,
                     const Tensor& scale_codes, const Tensor& scale_absmax,
                     const Tensor& scale_offset, const Tensor& partials, int64_t stream) {
  constexpr const char* kOp = "double_quantize";
  STD_TORCH_CHECK(scale_block_size > 0, kOp, ": scale_block_size must be positive, got ",
                  scale_block_size);
  qlk::DoubleQuantizeParams p;
  p.n_blocks = absmax.numel();
  p.scale_block_size = scale_block_size;
  p.absmax = read_cuda<float>(kOp, "absmax", absmax, ScalarType::Float, p.n_blocks);
  p.scale_codebook =
      read_cuda<float>(kOp, "scale_codebook", scale_codebook, ScalarType::Float, 256);
  p.scale_codes =
      write_cuda<uint8_t>(kOp, "scale_codes", scale_codes, ScalarType::Byte, p.n_blocks);
  p.scale_absmax = write_cuda<float>(kOp, "scale_absmax", scale_absmax, ScalarType::Float,
                                     ceil_div(p.n_blocks, scale_block_size));
  p.scale_offset = write_cuda<float>(kOp, "scale_offset", scale_offset, ScalarType::Float, 1);
  constexpr int64_t kPartials = qlk::cuda::kMaxSumParts * qlk::cuda::kSumBins;
  auto* scratch = write_cuda<int64_t>(kOp, "partials", partials, ScalarType::Long, kPartials);
  if (p.n_blocks == 0) return;
  const DeviceGuard guard(absmax.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_double_quantize(p, scratch, stream_pointer(stream)));
}

int64_t double_quantize_scratch() { return qlk::cuda::kMaxSumParts * qlk::cuda::kSumBins; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cuda, m) {
  m.def(
      "quantize(Tensor weight, Tensor boundaries, Tensor rank_codes, int zero_code, "
      "int block_size, Tensor? scales, Tensor(a!) codes, Tensor(b!) absmax, int stream) -> ()");
  m.def(
      "double_quantize(Tensor absmax, Tensor scale_codebook, int scale_block_size, "
      "Tensor(a!) scale_codes, Tensor(b!) scale_absmax, Tensor(c!) scale_offset, "
      "Tensor(d!) partials, int stream) -> ()");
  m.def("double_quantize_scratch() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("double_quantize", TORCH_BOX(&double_quantize));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("double_quantize_scratch", TORCH_BOX(&double_quantize_scratch));
}
