// torch.ops.qlora_kernels_cuda.fused_matmul, down_projection and dropout
#include <algorithm>

#include "cuda_matmul_operands.h"
#include "qlk/dropout.h"

namespace {

using namespace qlk::bindings;

// The checked operands of result [M,R] = x [M,K] · adapterᵀ [R,K].
qlk::cuda::DownProjectionParams projection_params(const char* op, const Tensor& x,
                                                  const Tensor& adapter, const Tensor& result) {
  qlk::cuda::DownProjectionParams p;
  p.dtype = float_dtype(op, "x", x);
  p.adapter_dtype = float_dtype(op, "adapter", adapter);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be 2-D");
  p.cols = x.size(1);
  p.tokens = check_matrix(op, "x", x, p.cols);
  p.rank = check_matrix(op, "adapter", adapter, p.cols);
  p.x = x.const_data_ptr();
  p.adapter = adapter.const_data_ptr();
  p.result = write_cuda<void>(op, "result", result, x.scalar_type(), p.tokens * p.rank);
  return p;
}

// `xa` [M,R] and `lora_b` [N,R] come together or not at all; `projected` [M,K], `adapter` [S,K] and
// `projection` [M,S], which xa is or is in, as well: then projection is computed first. With splits
// > 1, partials and tickets are the scratch that qlk/cuda/launch.h describes.
void fused_matmul(const Tensor& x, QLK_WEIGHT_PARAMETERS, const OptionalTensor& bias,
                  const OptionalTensor& xa, const OptionalTensor& lora_b, double scaling,
                  const Tensor& y, int64_t splits, const OptionalTensor& partials,
                  const OptionalTensor& tickets, const OptionalTensor& projected,
                  const OptionalTensor& adapter, const OptionalTensor& projection, int64_t stream) {
  constexpr const char* kOp = "fused_matmul";
  qlk::cuda::FusedMatmulParams p =
      matmul_operands(kOp, x, QLK_WEIGHT_ARGUMENTS, bias, xa, lora_b, scaling, y);
  STD_TORCH_CHECK(splits >= 1 && splits <= 65535, kOp, ": splits must be in 1 ... 65535, got ",
                  splits);
  p.splits = static_cast<int>(splits);
  if (splits > 1) {
    STD_TORCH_CHECK(partials && tickets, kOp, ": splits need partials and tickets");
    p.partials = write_cuda<float>(kOp, "partials", *partials, ScalarType::Float,
                                   qlk::cuda::fused_matmul_partials(p.tokens, rows, splits));
    const int64_t tiles = qlk::cuda::fused_matmul_tiles(p.tokens, rows);
    STD_TORCH_CHECK(tickets->numel() >= tiles, kOp, ": tickets must have ", tiles,
                    " elements, got ", tickets->numel());
    p.tickets = reinterpret_cast<uint32_t*>(
        write_cuda<int32_t>(kOp, "tickets", *tickets, ScalarType::Int, tickets->numel()));
  }
  const DeviceGuard guard(x.get_device_index());
  if (projected) {
    STD_TORCH_CHECK(xa && adapter && projection, kOp, ": a projection needs its operands and xa");
    const auto first = projection_params(kOp, *projected, *adapter, *projection);
    check_cuda(kOp, qlk::cuda::launch_projected_matmul(first, p, stream_pointer(stream)));
  } else {
    check_cuda(kOp, qlk::cuda::launch_fused_matmul(p, stream_pointer(stream)));
  }
}

void down_projection(const Tensor& x, const Tensor& adapter, const Tensor& result, int64_t stream) {
  constexpr const char* kOp = "down_projection";
  const auto p = projection_params(kOp, x, adapter, result);
  const DeviceGuard guard(x.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_down_projection(p, stream_pointer(stream)));
}

void dropout(const Tensor& x, double dropout_p, const Tensor& seed, const Tensor& out,
             int64_t stream) {
  constexpr const char* kOp = "dropout";
  qlk::cuda::DropoutParams p;
  p.dtype = float_dtype(kOp, "x", x);
  p.numel = x.numel();
  p.x = read_cuda<void>(kOp, "x", x, x.scalar_type(), p.numel);
  p.out = write_cuda<void>(kOp, "out", out, x.scalar_type(), p.numel);
  p.seed = read_cuda<int64_t>(kOp, "seed", seed, ScalarType::Long, 1);
  // The seed's bits stay on the device: reading them here would wait for it.
  const qlk::DropoutMask mask = qlk::dropout_mask(dropout_p, 0);
  p.threshold = mask.threshold;
  p.keep_scale = mask.keep_scale;
  const DeviceGuard guard(x.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_dropout(p, stream_pointer(stream)));
}

int64_t fused_matmul_partials(int64_t tokens, int64_t out_features, int64_t splits) {
  return qlk::cuda::fused_matmul_partials(tokens, out_features, splits);
}

int64_t fused_matmul_tiles(int64_t tokens, int64_t out_features) {
  return qlk::cuda::fused_matmul_tiles(tokens, out_features);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cuda, m) {
  m.def("fused_matmul(Tensor x, " QLK_WEIGHT_SCHEMA
        ", Tensor? bias, Tensor? xa, Tensor? lora_b, float scaling, Tensor(a!) y, int splits, "
        "Tensor(b!)? partials, Tensor(c!)? tickets, Tensor? projected, Tensor? adapter, "
        "Tensor(d!)? projection, int stream) -> ()");
  m.def("down_projection(Tensor x, Tensor adapter, Tensor(a!) result, int stream) -> ()");
  m.def("dropout(Tensor x, float dropout_p, Tensor seed, Tensor(a!) out, int stream) -> ()");
  m.def("fused_matmul_partials(int tokens, int out_features, int splits) -> int");
  m.def("fused_matmul_tiles(int tokens, int out_features) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CUDA, m) {
  m.impl("fused_matmul", TORCH_BOX(&fused_matmul));
  m.impl("down_projection", TORCH_BOX(&down_projection));
  m.impl("dropout", TORCH_BOX(&dropout));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("fused_matmul_partials", TORCH_BOX(&fused_matmul_partials));
  m.impl("fused_matmul_tiles", TORCH_BOX(&fused_matmul_tiles));
}
