// The library's account of itself, read by qlora_kernels/backends/library.py.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

#ifdef QLK_WITH_CUDA
#include "qlk/build_probe.h"
#endif

namespace {

#ifdef __clang__
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

// One "key=value" per line.
std::string build_info() {
  std::string info = std::string("compiler=") + kCompiler + "\ntorch=" QLK_BUILT_WITH_TORCH;
#ifdef QLK_WITH_CUDA
  info += std::string("\ncuda_archs=") + qlk::built_cuda_archs();
  info += "\ncuda_runtime=" + std::to_string(qlk::built_cuda_runtime());
#endif
  return info;
}

// The __CUDA_ARCH__ that the current GPU runs; minus the cudaError_t if it runs none.
int64_t build_probe() {
#ifdef QLK_WITH_CUDA
  int arch = 0;
  const int status = qlk::launch_build_probe(&arch);
  return status == 0 ? arch : -status;
#else
  return 0;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_native, m) {
  m.def("build_info() -> str");
  m.def("build_probe() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("build_probe", TORCH_BOX(&build_probe));
}
