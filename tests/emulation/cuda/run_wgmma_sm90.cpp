// The Hopper matmul's launcher for the runner.
#include "problem.h"
#include "qlk/cuda/launch_sm90.h"

namespace qlk::testing {
namespace {

int run_wgmma_matmul(const Problem& p) {
  cuda::WgmmaMatmulParams call;
  cuda::FusedMatmulParams& q = call.operands;
  q.weight.codes = p.pointer<uint8_t>("codes");
  q.weight.codebook = p.pointer<float>("codebook");
  q.weight.scales.absmax = p.pointer<float>("absmax");
  q.weight.scales.scale_codes = p.pointer<uint8_t>("scale_codes");
  q.weight.scales.scale_absmax = p.pointer<float>("scale_absmax");
  q.weight.scales.scale_offset = p.pointer<float>("scale_offset");
  q.weight.scales.scale_codebook = p.pointer<float>("scale_codebook");
  q.weight.scales.scale_block_size = p.integer("scale_block_size");
  q.weight.rows = p.integer("rows");
  q.weight.cols = p.integer("cols");
  q.weight.block_size = p.integer("block_size");
  q.x = p.pointer<void>("x");
  q.y = p.pointer<void>("y");
  q.dtype = static_cast<DType>(p.integer("dtype"));
  q.tokens = p.integer("tokens");
  q.bias = p.pointer<void>("bias");
  q.bias_dtype = static_cast<DType>(p.integer("bias_dtype"));
  q.xa = p.pointer<void>("xa");
  q.xa_stride = p.integer("xa_stride");
  q.lora_b = p.pointer<void>("lora_b");
  q.lora_b_dtype = static_cast<DType>(p.integer("lora_b_dtype"));
  q.rank = p.integer("rank");
  q.scaling = static_cast<float>(p.real("scaling"));
  q.partials = p.pointer<float>("partials");
  q.tickets = p.pointer<uint32_t>("tickets");
  call.tile_rows = static_cast<int>(p.integer("tile_rows"));
  call.tile_tokens = static_cast<int>(p.integer("tile_tokens"));
  call.blocks = static_cast<int>(p.integer("blocks"));
  call.arranged = p.pointer<void>("arranged");
  return cuda::launch_wgmma_matmul(call, nullptr);
}

const Registration wgmma_matmul("wgmma_matmul", run_wgmma_matmul);

}  // namespace
}  // namespace qlk::testing
