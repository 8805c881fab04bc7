// Declares the private namespace of the CPU kernels and reports the machine's best instruction-set
// level.
#include "tensor_utils.h"

namespace {

int64_t cpu_isa() { return static_cast<int64_t>(qlk::cpu_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) { m.def("cpu_isa() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
