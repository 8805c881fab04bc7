// The smallest kernel that proves a CUDA build: see qlk/build_probe.h.
#include <cuda_runtime.h>

#include "qlk/build_probe.h"
#include "qlk/cuda/launch.h"

namespace qlk {
namespace {

__global__ void build_probe_kernel(int* arch) {
#ifdef __CUDA_ARCH__
  *arch = __CUDA_ARCH__;
#endif
}

}  // namespace

const char* built_cuda_archs() { return QLK_CUDA_ARCHS; }

int built_cuda_runtime() { return CUDART_VERSION; }

const char* cuda::error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int launch_build_probe(int* arch) {
  int* device_arch = nullptr;
  cudaError_t status = cudaMalloc(&device_arch, sizeof(int));
  if (status != cudaSuccess) return status;
  build_probe_kernel<<<1, 1>>>(device_arch);
  status = cudaGetLastError();
  if (status == cudaSuccess) {
    status = cudaMemcpy(arch, device_arch, sizeof(int), cudaMemcpyDeviceToHost);
  }
  const cudaError_t freed = cudaFree(device_arch);
  return status == cudaSuccess ? freed : status;
}

}  // namespace qlk
