// The matmuls' launchers for the runner.
#include "matmul_operands.h"
#include "qlk/dropout.h"

namespace qlk::testing {
namespace {

cuda::FusedMatmulParams fused_matmul_params(const Problem& p) {
  cuda::FusedMatmulParams q = matmul_operands(p);
  q.splits = static_cast<int>(p.integer("splits"));
  return q;
}

int run_fused_matmul(const Problem& p) {
  return cuda::launch_fused_matmul(fused_matmul_params(p), nullptr);
}

cuda::DownProjectionParams down_projection_params(const Problem& p) {
  cuda::DownProjectionParams q;
  q.x = p.pointer<void>("x");
  q.dtype = static_cast<DType>(p.integer("dtype"));
  q.adapter = p.pointer<void>("adapter");
  q.adapter_dtype = static_cast<DType>(p.integer("adapter_dtype"));
  q.tokens = p.integer("tokens");
  q.cols = p.integer("cols");
  q.rank = p.integer("rank");
  q.result = p.pointer<void>("result");
  return q;
}

int run_down_projection(const Problem& p) {
  return cuda::launch_down_projection(down_projection_params(p), nullptr);
}

// xa is the first columns of the projection's result.
int run_projected_matmul(const Problem& p) {
  cuda::DownProjectionParams projection = down_projection_params(p);
  projection.rank = p.integer("xa_stride");
  cuda::FusedMatmulParams matmul = fused_matmul_params(p);
  matmul.xa = projection.result;
  return cuda::launch_projected_matmul(projection, matmul, nullptr);
}

int run_dropout(const Problem& p) {
  const DropoutMask mask = dropout_mask(p.real("dropout_p"), 0);
  cuda::DropoutParams q;
  q.x = p.pointer<char>("x") + p.integer("x_shift");
  q.out = p.pointer<void>("out");
  q.dtype = static_cast<DType>(p.integer("dtype"));
  q.numel = p.integer("numel");
  q.seed = p.pointer<int64_t>("seed");
  q.threshold = mask.threshold;
  q.keep_scale = mask.keep_scale;
  return cuda::launch_dropout(q, nullptr);
}

const Registration dropout("dropout", run_dropout);
const Registration fused_matmul("fused_matmul", run_fused_matmul);
const Registration projected_matmul("projected_matmul", run_projected_matmul);
const Registration down_projection("down_projection", run_down_projection);

}  // namespace
}  // namespace qlk::testing
