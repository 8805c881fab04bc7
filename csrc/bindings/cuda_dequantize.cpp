// torch.ops.qlora_kernels_cuda.dequantize
#include "cuda_utils.h"

namespace {

using namespace qlk::bindings;

constexpr const char* kOp = "dequantize";

// `out` is [rows, cols] with unit stride along a row.
void dequantize(QLK_WEIGHT_PARAMETERS, const Tensor& out, int64_t stream) {
  qlk::DequantizeParams p;
  p.weight = quantized_view(kOp, QLK_WEIGHT_ARGUMENTS, Place::kCuda);
  p.dtype = float_dtype(kOp, "out", out);
  STD_TORCH_CHECK(out.is_cuda() && out.dim() == 2 && out.size(0) == rows && out.size(1) == cols,
                  kOp, ": out must be a CUDA tensor [", rows, ", ", cols, "]");
  if (rows == 0 || cols == 0) return;
  p.row_stride = rows == 1 ? cols : out.stride(0);
  STD_TORCH_CHECK((cols == 1 || out.stride(1) == 1) && p.row_stride >= cols, kOp,
                  ": out must have rows of unit stride that do not overlap, got strides (",
                  out.stride(0), ", ", out.stride(1), ")");
  p.out = out.mutable_data_ptr();
  const DeviceGuard guard(out.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_dequantize(&p, 1, stream_pointer(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cuda, m) {
  m.def("dequantize(" QLK_WEIGHT_SCHEMA ", Tensor(a!) out, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CUDA, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
}
