// What the CUDA half of this library was compiled for, and which of its binaries a GPU runs.
#pragma once

namespace qlk {

// The targets of this build as nvcc names them, separated by spaces: "80 86 89 90a".
const char* built_cuda_archs();

// CUDART_VERSION of the statically linked runtime: 13000 is CUDA 13.0.
int built_cuda_runtime();

// Runs one thread on the current device and writes the __CUDA_ARCH__ its binary was compiled for
// (900 is sm_90) to *arch. Waits for the device. Returns a cudaError_t; *arch is set if it is 0.
int launch_build_probe(int* arch);

}  // namespace qlk
