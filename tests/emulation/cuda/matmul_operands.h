// A request's operands, as the launchers of the matmuls take them.
#pragma once

#include "problem.h"
#include "qlk/cuda/launch.h"

namespace qlk::testing {

inline cuda::FusedMatmulParams matmul_operands(const Problem& p) {
  cuda::FusedMatmulParams q;
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
  q.lora_b = p.pointer<void>("lora_b");
  q.lora_b_dtype = static_cast<DType>(p.integer("lora_b_dtype"));
  q.rank = p.integer("rank");
  q.xa_stride = p.integer("xa_stride");
  q.scaling = static_cast<float>(p.real("scaling"));
  q.partials = p.pointer<float>("partials");
  q.tickets = p.pointer<uint32_t>("tickets");
  return q;
}

}  // namespace qlk::testing
