// Declares the private namespace of the CPU kernels and reports the machine's best instruction-set
// level, and whether its bf16 products pay.
#include "tensor_utils.h"

namespace {

int64_t cpu_isa() { return static_cast<int64_t>(qlk::cpu_isa()); }

bool bf16_products_pay(int64_t isa) {
  return qlk::bf16_products_pay(qlk::bindings::checked_isa("bf16_products_pay", isa));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def("cpu_isa() -> int");
  m.def("bf16_products_pay(int isa) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("bf16_products_pay", TORCH_BOX(&bf16_products_pay));
}
