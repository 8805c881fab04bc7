// The launchers of the adapter's gradients for the runner.
#include "problem.h"
#include "qlk/cuda/launch.h"

namespace qlk::testing {
namespace {

int run_low_rank_gradient(const Problem& p) {
  cuda::LowRankGradientParams q;
  q.data = p.pointer<char>("data") + p.integer("data_shift");
  q.left = p.pointer<void>("left");
  q.dtype = static_cast<DType>(p.integer("dtype"));
  q.tokens = p.integer("tokens");
  q.cols = p.integer("cols");
  q.rank = p.integer("rank");
  q.token_slices = static_cast<int>(p.integer("token_slices"));
  q.gradient_partials = p.pointer<float>("gradient_partials");
  q.rank_major = p.integer("rank_major") != 0;
  q.right = p.pointer<void>("right");
  q.right_dtype = static_cast<DType>(p.integer("right_dtype"));
  q.right_rank_major = p.integer("right_rank_major") != 0;
  q.u_partials = p.pointer<float>("u_partials");
  q.copy = p.pointer<void>("copy");
  q.copy_stride = p.integer("copy_stride");
  return cuda::launch_low_rank_gradient(q, nullptr);
}

int run_partial_sums(const Problem& p) {
  cuda::PartialSums sums[cuda::kMaxPartialSums];
  const auto count = static_cast<int>(p.integer("count"));
  for (int i = 0; i < count; ++i) {
    const std::string suffix = std::to_string(i);
    cuda::PartialSums& s = sums[i];
    s.partials = p.pointer<float>("partials" + suffix);
    s.parts = p.integer("parts" + suffix);
    s.rows = p.integer("rows" + suffix);
    s.cols = p.integer("cols" + suffix);
    s.scaling = static_cast<float>(p.real("scaling" + suffix));
    s.out = p.pointer<void>("out" + suffix);
    s.dtype = static_cast<DType>(p.integer("dtype" + suffix));
    s.tail = p.pointer<void>("tail" + suffix);
    s.tail_stride = p.integer("tail_stride" + suffix);
    s.tail_cols = p.integer("tail_cols" + suffix);
  }
  return cuda::launch_partial_sums(sums, count, nullptr);
}

const Registration low_rank_gradient("low_rank_gradient", run_low_rank_gradient);
const Registration partial_sums("partial_sums", run_partial_sums);

}  // namespace
}  // namespace qlk::testing
