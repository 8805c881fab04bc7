// Plain types shared by every kernel: dtypes, instruction sets, the thread pool and the quantized
// operand. Torch-free: bindings fill these structs from tensors, kernels only see pointers and
// sizes.
#pragma once

#include <cstdint>

namespace qlk {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Ordered: a higher value implies every lower one. The integer values cross the op border.
enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

enum class Status : int32_t { kOk = 0, kUnsupported = 1, kOutOfMemory = 2 };

// Runs body(context, begin, end) over disjoint chunks that cover [begin, end); the caller owns the
// threads (torch's own pool in the bindings), so kernels never start one.
struct ThreadPool {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain_size, Body body, void* context);
  int num_threads;

  template <class Function>
  void run(int64_t begin, int64_t end, int64_t grain_size, Function&& function) const {
    auto body = [](void* context, int64_t b, int64_t e) {
      (*static_cast<Function*>(context))(b, e);
    };
    if (begin < end) parallel_for(begin, end, grain_size, body, &function);
  }
};

// First-level scales: `absmax` alone, or double-quantized (all of the other pointers).
// Decoded scale of block b: absmax[b], or fl(fl(scale_codebook[scale_codes[b]] * scale_absmax[b /
// scale_block_size]) + *scale_offset): two roundings, never a fused multiply-add. It may be zero or
// negative.
struct ScalesView {
  const float* absmax = nullptr;          // [n_blocks]
  const uint8_t* scale_codes = nullptr;   // [n_blocks]
  const float* scale_absmax = nullptr;    // [ceil(n_blocks / scale_block_size)]
  const float* scale_offset = nullptr;    // [1]
  const float* scale_codebook = nullptr;  // [256]
  int64_t scale_block_size = 256;

  bool nested() const { return scale_codes != nullptr; }
};

// A weight [rows, cols] quantized over its row-major flattening in blocks of block_size elements
// (blocks straddle rows when cols % block_size != 0; the last one may be short). Element 2i sits in
// the high nibble of byte i, 2i + 1 in the low one.
struct QuantizedView {
  const uint8_t* codes = nullptr;   // [ceil(rows * cols / 2)]
  const float* codebook = nullptr;  // [16], by code; unused entries are NaN
  ScalesView scales;
  int64_t rows = 0, cols = 0;
  int64_t block_size = 64;  // a power of two in 32 ... 4096
};

}  // namespace qlk
