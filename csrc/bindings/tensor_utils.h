// What every binding needs: torch tensors checked and turned into the plain views of qlk/types.h,
// torch's threads as a ThreadPool.
//
// User errors are reported by the Python border (qlora_kernels/ops); the checks here are those
// without which a kernel would read or write outside a tensor. Outputs are allocated by the caller
// and come in as mutable arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "qlk/isa.h"
#include "qlk/types.h"

// The quantized operand of an op: its schema, its C++ parameters and the same names as arguments.
// The stable ABI boxes a function by its parameter list, so the list cannot be a struct.
#define QLK_WEIGHT_SCHEMA                                                             \
  "Tensor codes, Tensor? absmax, Tensor? scale_codes, Tensor? scale_absmax, Tensor? " \
  "scale_offset, Tensor codebook, "                                                   \
  "Tensor? scale_codebook, int rows, int cols, int block_size, int scale_block_size"
#define QLK_WEIGHT_PARAMETERS                                                                \
  const torch::stable::Tensor &codes, const std::optional<torch::stable::Tensor>&absmax,     \
      const std::optional<torch::stable::Tensor>&scale_codes,                                \
      const std::optional<torch::stable::Tensor>&scale_absmax,                               \
      const std::optional<torch::stable::Tensor>&scale_offset,                               \
      const torch::stable::Tensor &codebook,                                                 \
      const std::optional<torch::stable::Tensor>&scale_codebook, int64_t rows, int64_t cols, \
      int64_t block_size, int64_t scale_block_size
#define QLK_WEIGHT_ARGUMENTS                                                                    \
  codes, absmax, scale_codes, scale_absmax, scale_offset, codebook, scale_codebook, rows, cols, \
      block_size, scale_block_size

namespace qlk::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Torch's intra-op threads. Inside a parallel region torch runs the body inline, as
// at::parallel_for does.
inline ThreadPool torch_threads() {
  return {[](int64_t begin, int64_t end, int64_t grain_size, ThreadPool::Body body, void* context) {
            struct Call {
              ThreadPool::Body body;
              void* context;
            };
            torch::stable::parallel_for(begin, end, grain_size,
                                        [call = Call{body, context}](int64_t b, int64_t e) {
                                          call.body(call.context, b, e);
                                        });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

inline const char* dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

// The kernels' dtype of a float tensor.
inline DType float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float16 or bfloat16, got ",
                      dtype_name(tensor.scalar_type()));
  }
}

// Where an op's tensors must be.
enum class Place { kCpu, kCuda };

// A contiguous tensor of the given place, dtype and number of elements.
inline void check_operand(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                          int64_t numel, Place place = Place::kCpu) {
  STD_TORCH_CHECK(place == Place::kCuda ? tensor.is_cuda() : tensor.is_cpu(), op, ": ", name,
                  place == Place::kCuda ? " must be on a CUDA device" : " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype),
                  ", got ", dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == numel, op, ": ", name, " must have ", numel, " elements, got ",
                  tensor.numel());
}

template <class T>
const T* read_operand(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                      int64_t numel, Place place = Place::kCpu) {
  check_operand(op, name, tensor, dtype, numel, place);
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write_operand(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                 int64_t numel, Place place = Place::kCpu) {
  check_operand(op, name, tensor, dtype, numel, place);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// fp32 values, or the int32 bits of them that a layer holds as its parameters.
inline const float* read_floats(const char* op, const char* name, const Tensor& tensor,
                                int64_t numel, Place place) {
  const bool bits = tensor.scalar_type() == ScalarType::Int;
  return read_operand<float>(op, name, tensor, bits ? ScalarType::Int : ScalarType::Float, numel,
                             place);
}

// First-level scales of n_blocks blocks: exactly one of absmax and the four of double quantization.
inline ScalesView scales_view(const char* op, int64_t n_blocks, const OptionalTensor& absmax,
                              const OptionalTensor& scale_codes, const OptionalTensor& scale_absmax,
                              const OptionalTensor& scale_offset,
                              const OptionalTensor& scale_codebook, int64_t scale_block_size,
                              Place place = Place::kCpu) {
  ScalesView view;
  STD_TORCH_CHECK(absmax.has_value() != scale_codes.has_value(), op,
                  ": exactly one of absmax and scale_codes must be given");
  if (absmax) {
    view.absmax = read_floats(op, "absmax", *absmax, n_blocks, place);
    return view;
  }
  STD_TORCH_CHECK(scale_absmax && scale_offset && scale_codebook, op,
                  ": scale_codes must come with scale_absmax, scale_offset and scale_codebook");
  STD_TORCH_CHECK(scale_block_size > 0, op, ": scale_block_size must be positive, got ",
                  scale_block_size);
  view.scale_block_size = scale_block_size;
  view.scale_codes =
      read_operand<uint8_t>(op, "scale_codes", *scale_codes, ScalarType::Byte, n_blocks, place);
  view.scale_absmax =
      read_floats(op, "scale_absmax", *scale_absmax, ceil_div(n_blocks, scale_block_size), place);
  view.scale_offset = read_floats(op, "scale_offset", *scale_offset, 1, place);
  view.scale_codebook = read_floats(op, "scale_codebook", *scale_codebook, 256, place);
  return view;
}

// The kernels for CUDA take blocks of 16 as well: eight elements of one are a lane's.
inline void check_block_size(const char* op, int64_t block_size, Place place = Place::kCpu) {
  const int64_t least = place == Place::kCuda ? 16 : 32;
  STD_TORCH_CHECK(block_size >= least && block_size <= 4096 && (block_size & (block_size - 1)) == 0,
                  op, ": block_size must be a power of two from ", least, " to 4096, got ",
                  block_size);
}

// The quantized operand, from the parameters that QLK_WEIGHT_PARAMETERS declares.
inline QuantizedView quantized_view(const char* op, QLK_WEIGHT_PARAMETERS,
                                    Place place = Place::kCpu) {
  check_block_size(op, block_size, place);
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, op, ": rows and cols must not be negative, got ", rows,
                  " and ", cols);
  const int64_t numel = rows * cols;
  QuantizedView view;
  view.codes =
      read_operand<uint8_t>(op, "codes", codes, ScalarType::Byte, ceil_div(numel, 2), place);
  view.codebook = read_floats(op, "codebook", codebook, 16, place);
  view.scales = scales_view(op, ceil_div(numel, block_size), absmax, scale_codes, scale_absmax,
                            scale_offset, scale_codebook, scale_block_size, place);
  view.rows = rows;
  view.cols = cols;
  view.block_size = block_size;
  return view;
}

// The path an op was asked to take; never one that this machine lacks.
inline Isa checked_isa(const char* op, int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= static_cast<int64_t>(cpu_isa()), op, ": isa must be at most ",
                  static_cast<int64_t>(cpu_isa()), " (", isa_name(cpu_isa()),
                  ") on this machine, got ", isa);
  return static_cast<Isa>(isa);
}

inline void check_status(const char* op, Status status) {
  STD_TORCH_CHECK(status != Status::kOutOfMemory, op, ": out of memory for scratch");
  STD_TORCH_CHECK(status == Status::kOk, op, ": the kernel does not support this problem (status ",
                  static_cast<int32_t>(status), ")");
}

}  // namespace qlk::bindings
