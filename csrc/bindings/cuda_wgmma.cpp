// torch.ops.qlora_kernels_cuda.wgmma_matmul
#include "cuda_matmul_operands.h"
#include "qlk/cuda/launch_sm90.h"

namespace {

using namespace qlk::bindings;

// Operands as matmul_operands has them; `arranged`, `partials` and `tickets` are the scratch that
// qlk/cuda/launch_sm90.h describes.
void wgmma_matmul(const Tensor& x, QLK_WEIGHT_PARAMETERS, const OptionalTensor& bias,
                  const OptionalTensor& xa, const OptionalTensor& lora_b, double scaling,
                  const Tensor& y, int64_t tile_rows, int64_t tile_tokens, int64_t blocks,
                  const Tensor& arranged, const Tensor& partials, const Tensor& tickets,
                  int64_t stream) {
  constexpr const char* kOp = "wgmma_matmul";
  namespace cuda = qlk::cuda;
  cuda::WgmmaMatmulParams call;
  cuda::FusedMatmulParams& p = call.operands;
  p = matmul_operands(kOp, x, QLK_WEIGHT_ARGUMENTS, bias, xa, lora_b, scaling, y);
  STD_TORCH_CHECK(cuda::wgmma_matmul_runs(tile_rows, tile_tokens), kOp, ": no tiles of ", tile_rows,
                  " rows and ", tile_tokens, " tokens");
  STD_TORCH_CHECK(blocks >= 1 && blocks < int64_t{1} << 20, kOp, ": blocks must be positive, got ",
                  blocks);
  call.tile_rows = static_cast<int>(tile_rows);
  call.tile_tokens = static_cast<int>(tile_tokens);
  call.blocks = static_cast<int>(blocks);
  call.arranged =
      write_cuda<void>(kOp, "arranged", arranged, x.scalar_type(),
                       cuda::wgmma_matmul_arranged(p.tokens, cols, p.rank, tile_tokens));
  p.partials = write_cuda<float>(kOp, "partials", partials, ScalarType::Float,
                                 cuda::wgmma_matmul_partials(blocks, tile_rows, tile_tokens));
  const int64_t needed = cuda::wgmma_matmul_tickets(p.tokens, rows, tile_rows, tile_tokens);
  STD_TORCH_CHECK(tickets.numel() >= needed, kOp, ": tickets must have ", needed, " elements, got ",
                  tickets.numel());
  p.tickets = reinterpret_cast<uint32_t*>(
      write_cuda<int32_t>(kOp, "tickets", tickets, ScalarType::Int, tickets.numel()));
  const DeviceGuard guard(x.get_device_index());
  check_cuda(kOp, cuda::launch_wgmma_matmul(call, stream_pointer(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cuda, m) {
  m.def("wgmma_matmul(Tensor x, " QLK_WEIGHT_SCHEMA
        ", Tensor? bias, Tensor? xa, Tensor? lora_b, float scaling, Tensor(a!) y, int tile_rows, "
        "int tile_tokens, int blocks, Tensor(b!) arranged, Tensor(c!) partials, Tensor(d!) tickets,"
        " int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CUDA, m) {
  m.impl("wgmma_matmul", TORCH_BOX(&wgmma_matmul));
}
