// torch.ops.qlora_kernels_cpu.linear_inference: a whole inference call of a layer, from x [..., K]
// to y [..., N], for few tokens, or None where the call has to take the long way through the ops.
//
// With one token a weight is read in less time than Python takes for its checks, its choice and its
// allocations when the weight before has pushed them all out of the caches. Nothing is kept between
// calls: every pointer is asked of the tensors that the caller holds.
//
// The long way is taken, too, wherever torch's dispatcher would do more than call a CPU kernel: it
// then comes to `LeaveToTheOps`. Checks in Python would cost every call some 20 µs.
#include "adapter_utils.h"

namespace {

using namespace qlk::bindings;

constexpr const char* kOp = "linear_inference";
constexpr int64_t kMostDims = 8;

bool is_float(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

bool readable(const Tensor& tensor) { return tensor.is_cpu() && tensor.is_contiguous(); }
bool readable(const OptionalTensor& tensor) { return !tensor || readable(*tensor); }

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t cols) {
  return readable(tensor) && is_float(tensor) && tensor.dim() == 2 &&
         (rows < 0 || tensor.size(0) == rows) && tensor.size(1) == cols;
}

// What the ops refuse or convert is left to them.
bool takes(const Tensor& x, QLK_WEIGHT_PARAMETERS, const OptionalTensor& bias,
           const OptionalTensor& lora_a, const OptionalTensor& lora_b) {
  const int64_t dims = x.dim();
  if (!readable(x) || !is_float(x) || dims < 1 || dims > kMostDims || x.size(dims - 1) != cols)
    return false;
  if (rows == 0 || cols == 0 || block_size < 32 || scale_block_size <= 0) return false;
  if (!readable(codes) || !readable(codebook) || !readable(absmax) || !readable(scale_codes) ||
      !readable(scale_absmax) || !readable(scale_offset) || !readable(scale_codebook))
    return false;
  if (bias && !(readable(*bias) && is_float(*bias) && bias->dim() == 1 && bias->size(0) == rows))
    return false;
  if (lora_a.has_value() != lora_b.has_value()) return false;
  return !lora_a || (is_matrix(*lora_a, -1, cols) && is_matrix(*lora_b, rows, lora_a->size(0)));
}

// y [..., N] for x [..., K].
Tensor empty_result(const Tensor& x, int64_t rows) {
  int64_t sizes[kMostDims], strides[kMostDims], stride = 1;
  const int64_t dims = x.dim();
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? rows : x.size(d);
    strides[d] = stride;
    stride *= sizes[d];
  }
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// `dot_tokens`, `tile_tokens`: most tokens of the dot products, fewest of AMX tiles, which have no
// upper limit.
OptionalTensor linear_inference(const Tensor& x, QLK_WEIGHT_PARAMETERS, const OptionalTensor& bias,
                                const OptionalTensor& lora_a, const OptionalTensor& lora_b,
                                double scaling, int64_t dot_tokens, int64_t tile_tokens,
                                int64_t isa_level) {
  if (!takes(x, QLK_WEIGHT_ARGUMENTS, bias, lora_a, lora_b)) return std::nullopt;
  const qlk::Isa isa = checked_isa(kOp, isa_level);
  qlk::QuantizedMatmulParams p;
  p.dtype = float_dtype(kOp, "x", x);
  p.tokens = x.numel() / cols;
  const bool tiles = qlk::amx_runs(p.dtype, isa) && p.tokens >= tile_tokens;
  if (p.tokens == 0 || (!tiles && p.tokens > dot_tokens)) return std::nullopt;

  p.weight = quantized_view(kOp, QLK_WEIGHT_ARGUMENTS);
  set_bias(kOp, bias, rows, &p);
  Tensor y = empty_result(x, rows);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (lora_a && lora_a->size(0) > 0) {
    const qlk::AdapterView a = view_of_a(kOp, *lora_a, cols);
    const qlk::AdapterView b = view_of_b(kOp, *lora_b, rows, a.rank);
    float* left = left_scratch(kOp, p.tokens, a.rank);
    project(kOp, p.x, p.dtype, p.tokens, a, 1.0f, tiles, isa, left);
    set_low_rank(b, left, static_cast<float>(scaling), &p);
  }
  check_status(kOp, run_forward(p, tiles, isa));
  return y;
}

template <typename Function>
struct LeaveToTheOps;

template <typename... Arguments>
struct LeaveToTheOps<OptionalTensor(Arguments...)> {
  static OptionalTensor run(Arguments...) { return std::nullopt; }
};

using Leave = LeaveToTheOps<decltype(linear_inference)>;

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def("linear_inference(Tensor x, " QLK_WEIGHT_SCHEMA
        ", Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling, int dot_tokens, "
        "int tile_tokens, int isa) -> Tensor?");
}

// For tensors of every device: those that are not the CPU's are turned down like the rest.
STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("linear_inference", TORCH_BOX(&linear_inference));
}

// Dispatch modes and tensor subclasses; torch.func; autocast.
STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, Python, m) {
  m.impl("linear_inference", TORCH_BOX(&Leave::run));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("linear_inference", TORCH_BOX(&Leave::run));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, AutocastCPU, m) {
  m.impl("linear_inference", TORCH_BOX(&Leave::run));
}
