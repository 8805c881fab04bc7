// torch.ops.qlora_kernels_cuda.dequantize and dequantize_many
#include <algorithm>
#include <vector>

#include "cuda_utils.h"

namespace {

using namespace qlk::bindings;

// `out` is [rows, cols] with unit stride along a row.
qlk::DequantizeParams parameters(const char* op, QLK_WEIGHT_PARAMETERS, const Tensor& out) {
  qlk::DequantizeParams p;
  p.weight = quantized_view(op, QLK_WEIGHT_ARGUMENTS, Place::kCuda);
  p.dtype = float_dtype(op, "out", out);
  STD_TORCH_CHECK(out.is_cuda() && out.dim() == 2 && out.size(0) == rows && out.size(1) == cols, op,
                  ": out must be a CUDA tensor [", rows, ", ", cols, "]");
  STD_TORCH_CHECK(out.get_device_index() == codes.get_device_index(), op,
                  ": out must be on the weight's device");
  if (rows == 0 || cols == 0) return p;
  p.row_stride = rows == 1 ? cols : out.stride(0);
  STD_TORCH_CHECK((cols == 1 || out.stride(1) == 1) && p.row_stride >= cols, op,
                  ": out must have rows of unit stride that do not overlap, got strides (",
                  out.stride(0), ", ", out.stride(1), ")");
  p.out = out.mutable_data_ptr();
  return p;
}

void dequantize(QLK_WEIGHT_PARAMETERS, const Tensor& out, int64_t stream) {
  constexpr const char* kOp = "dequantize";
  const qlk::DequantizeParams p = parameters(kOp, QLK_WEIGHT_ARGUMENTS, out);
  const DeviceGuard guard(out.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_dequantize(&p, 1, stream_pointer(stream)));
}

// The same for lists of them, outs of one dtype and device, in as few launches as the kernel's
// table of matrices allows. All is checked before the first launch.
void dequantize_many(
    const std::vector<Tensor>& codes, const std::vector<OptionalTensor>& absmax,
    const std::vector<OptionalTensor>& scale_codes, const std::vector<OptionalTensor>& scale_absmax,
    const std::vector<OptionalTensor>& scale_offset, const std::vector<Tensor>& codebook,
    const std::vector<OptionalTensor>& scale_codebook, const std::vector<int64_t>& rows,
    const std::vector<int64_t>& cols, const std::vector<int64_t>& block_size,
    const std::vector<int64_t>& scale_block_size, const std::vector<Tensor>& outs, int64_t stream) {
  constexpr const char* kOp = "dequantize_many";
  const size_t count = codes.size();
  for (const size_t size :
       {absmax.size(), scale_codes.size(), scale_absmax.size(), scale_offset.size(),
        codebook.size(), scale_codebook.size(), rows.size(), cols.size(), block_size.size(),
        scale_block_size.size(), outs.size()})
    STD_TORCH_CHECK(size == count, kOp, ": every list must have ", count, " elements, got ", size);
  if (count == 0) return;
  std::vector<qlk::DequantizeParams> matrices;
  for (size_t i = 0; i < count; ++i) {
    matrices.push_back(parameters(kOp, codes[i], absmax[i], scale_codes[i], scale_absmax[i],
                                  scale_offset[i], codebook[i], scale_codebook[i], rows[i], cols[i],
                                  block_size[i], scale_block_size[i], outs[i]));
    STD_TORCH_CHECK(outs[i].scalar_type() == outs[0].scalar_type() &&
                        outs[i].get_device_index() == outs[0].get_device_index(),
                    kOp, ": outs must be of one dtype and device");
  }
  const DeviceGuard guard(outs[0].get_device_index());
  for (size_t begin = 0; begin < count; begin += qlk::cuda::kMaxMatrices) {
    const size_t chunk = std::min(count - begin, size_t{qlk::cuda::kMaxMatrices});
    check_cuda(kOp, qlk::cuda::launch_dequantize(&matrices[begin], static_cast<int>(chunk),
                                                 stream_pointer(stream)));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cuda, m) {
  m.def("dequantize(" QLK_WEIGHT_SCHEMA ", Tensor(a!) out, int stream) -> ()");
  m.def(
      "dequantize_many(Tensor[] codes, Tensor?[] absmax, Tensor?[] scale_codes, "
      "Tensor?[] scale_absmax, Tensor?[] scale_offset, Tensor[] codebook, "
      "Tensor?[] scale_codebook, int[] rows, int[] cols, int[] block_size, "
      "int[] scale_block_size, Tensor(a!)[] outs, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CUDA, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize_many", TORCH_BOX(&dequantize_many));
}
