// What the CUDA bindings add to tensor_utils.h: the stream, the device and cudaError_t.
//
// The stream comes from Python as a number: the stable ABI of torch 2.10 cannot tell a stream's
// handle.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "qlk/cuda/launch.h"
#include "tensor_utils.h"

namespace qlk::bindings {

using torch::stable::accelerator::DeviceGuard;

inline void* stream_pointer(int64_t stream) { return reinterpret_cast<void*>(stream); }

inline void check_cuda(const char* op, int status) {
  STD_TORCH_CHECK(status == 0, op, ": CUDA error ", status, ": ", cuda::error_text(status));
}

template <class T>
const T* read_cuda(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                   int64_t numel) {
  return read_operand<T>(op, name, tensor, dtype, numel, Place::kCuda);
}

template <class T>
T* write_cuda(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
              int64_t numel) {
  return write_operand<T>(op, name, tensor, dtype, numel, Place::kCuda);
}

}  // namespace qlk::bindings
