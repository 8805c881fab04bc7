// dequantize: packed codes and scales to a dense weight, nested scales decoded on the way.
#pragma once

#include "qlk/types.h"

namespace qlk {

struct DequantizeParams {
  QuantizedView weight;
  void* out = nullptr;  // [rows, cols], element (r, c) at r * row_stride + c
  DType dtype = DType::kFloat32;
  int64_t row_stride = 0;  // in elements, at least cols
  // Whether `out` was just allocated: a large one then has no pages yet, and the first write to
  // each page makes the kernel clear it.
  bool fresh = false;
};

Status dequantize(const DequantizeParams& params, Isa isa, const ThreadPool& pool);

}  // namespace qlk
