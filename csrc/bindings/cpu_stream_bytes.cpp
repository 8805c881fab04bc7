// torch.ops.qlora_kernels_cpu.stream_bytes
#include "qlk/stream_bytes.h"
#include "tensor_utils.h"

namespace {

using namespace qlk::bindings;

constexpr const char* kOp = "stream_bytes";

void stream_bytes(const Tensor& source, const Tensor& target, int64_t isa) {
  qlk::StreamBytesParams p;
  p.source_bytes = source.numel();
  p.target_bytes = target.numel();
  p.source = read_operand<uint8_t>(kOp, "source", source, ScalarType::Byte, p.source_bytes);
  p.target = write_operand<uint8_t>(kOp, "target", target, ScalarType::Byte, p.target_bytes);
  check_status(kOp, qlk::stream_bytes(p, checked_isa(kOp, isa), torch_threads()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def("stream_bytes(Tensor source, Tensor(a!) target, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CPU, m) {
  m.impl("stream_bytes", TORCH_BOX(&stream_bytes));
}
