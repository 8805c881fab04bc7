// The codecs' launchers for the runner.
#include "problem.h"
#include "qlk/cuda/launch.h"

namespace qlk::testing {
namespace {

ScalesView scales_of(const Problem& p, const std::string& suffix = "") {
  ScalesView view;
  view.absmax = p.pointer<float>("absmax" + suffix);
  view.scale_codes = p.pointer<uint8_t>("scale_codes" + suffix);
  view.scale_absmax = p.pointer<float>("scale_absmax" + suffix);
  view.scale_offset = p.pointer<float>("scale_offset" + suffix);
  view.scale_codebook = p.pointer<float>("scale_codebook" + suffix);
  view.scale_block_size = p.integer("scale_block_size" + suffix);
  return view;
}

int run_dequantize(const Problem& p) {
  DequantizeParams matrices[cuda::kMaxMatrices];
  const auto count = static_cast<int>(p.integer("count"));
  for (int i = 0; i < count; ++i) {
    const std::string suffix = std::to_string(i);
    DequantizeParams& m = matrices[i];
    m.weight.codes = p.pointer<uint8_t>("codes" + suffix) + p.integer("codes_shift" + suffix);
    m.weight.codebook = p.pointer<float>("codebook" + suffix);
    m.weight.scales = scales_of(p, suffix);
    m.weight.rows = p.integer("rows" + suffix);
    m.weight.cols = p.integer("cols" + suffix);
    m.weight.block_size = p.integer("block_size" + suffix);
    m.out = p.pointer<char>("out" + suffix) + p.integer("out_shift" + suffix);
    m.dtype = static_cast<DType>(p.integer("dtype"));
    m.row_stride = p.integer("row_stride" + suffix);
  }
  return cuda::launch_dequantize(matrices, count, nullptr);
}

int run_quantize(const Problem& p) {
  QuantizeParams q;
  q.weight = p.pointer<char>("weight") + p.integer("weight_shift");
  q.dtype = static_cast<DType>(p.integer("dtype"));
  q.numel = p.integer("numel");
  q.block_size = p.integer("block_size");
  q.n_levels = static_cast<int32_t>(p.integer("n_levels"));
  q.boundaries = p.pointer<float>("boundaries");
  q.midpoints = p.pointer<double>("midpoints");
  q.rank_codes = p.pointer<uint8_t>("rank_codes");
  q.zero_code = static_cast<uint8_t>(p.integer("zero_code"));
  q.scales = p.pointer<float>("scales");
  q.codes = p.pointer<uint8_t>("codes");
  q.absmax = p.pointer<float>("absmax");
  return cuda::launch_quantize(q, nullptr);
}

int run_double_quantize(const Problem& p) {
  DoubleQuantizeParams q;
  q.absmax = p.pointer<float>("absmax");
  q.scale_codebook = p.pointer<float>("scale_codebook");
  q.n_blocks = p.integer("n_blocks");
  q.scale_block_size = p.integer("scale_block_size");
  q.scale_codes = p.pointer<uint8_t>("scale_codes");
  q.scale_absmax = p.pointer<float>("scale_absmax");
  q.scale_offset = p.pointer<float>("scale_offset");
  return cuda::launch_double_quantize(q, p.pointer<int64_t>("partials"), nullptr);
}

const Registration dequantize("dequantize", run_dequantize);
const Registration quantize("quantize", run_quantize);
const Registration double_quantize("double_quantize", run_double_quantize);

}  // namespace
}  // namespace qlk::testing
