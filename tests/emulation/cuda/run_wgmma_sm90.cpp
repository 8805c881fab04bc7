// The Hopper matmul's launcher for the runner.
#include "matmul_operands.h"
#include "qlk/cuda/launch_sm90.h"

namespace qlk::testing {
namespace {

int run_wgmma_matmul(const Problem& p) {
  cuda::WgmmaMatmulParams call;
  call.operands = matmul_operands(p);
  call.tile_rows = static_cast<int>(p.integer("tile_rows"));
  call.tile_tokens = static_cast<int>(p.integer("tile_tokens"));
  call.blocks = static_cast<int>(p.integer("blocks"));
  call.arranged = p.pointer<void>("arranged");
  return cuda::launch_wgmma_matmul(call, nullptr);
}

const Registration wgmma_matmul("wgmma_matmul", run_wgmma_matmul);

}  // namespace
}  // namespace qlk::testing
