// torch.ops.qlora_kernels_cuda.adapter_gradients, token_product and column_product
#include "cuda_utils.h"

namespace {

using namespace qlk::bindings;
using qlk::cuda::LowRankGradientParams;
using qlk::cuda::PartialSums;

// data [M,C] of a half dtype, times something of R columns.
LowRankGradientParams sizes(const char* op, const char* name, const Tensor& data, int64_t rank,
                            int64_t token_slices) {
  LowRankGradientParams p;
  STD_TORCH_CHECK(data.dim() == 2, op, ": ", name, " must be 2-D");
  p.dtype = float_dtype(op, name, data);
  STD_TORCH_CHECK(p.dtype != qlk::DType::kFloat32, op, ": ", name,
                  " must be float16 or bfloat16, got float32");
  p.tokens = data.size(0);
  p.cols = data.size(1);
  p.rank = rank;
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  STD_TORCH_CHECK(p.rank == 0 || (p.cols <= kMost / p.rank && p.tokens <= kMost / p.rank), op,
                  ": results must have fewer than 2^31 elements, got M, C, R = ", p.tokens, ", ",
                  p.cols, ", ", p.rank);
  STD_TORCH_CHECK(token_slices >= 1 && token_slices <= 65535, op,
                  ": token_slices must be in 1 ... 65535, got ", token_slices);
  STD_TORCH_CHECK(p.tokens > 0, op, ": ", name, " must have rows");
  p.token_slices = static_cast<int>(token_slices);
  p.data = read_cuda<void>(op, name, data, data.scalar_type(), p.tokens * p.cols);
  return p;
}

// The same with left [M,R].
LowRankGradientParams operands(const char* op, const char* data_name, const Tensor& data,
                               const char* left_name, const Tensor& left, int64_t token_slices) {
  STD_TORCH_CHECK(left.dim() == 2, op, ": ", left_name, " must be 2-D");
  LowRankGradientParams p = sizes(op, data_name, data, left.size(1), token_slices);
  p.left = read_cuda<void>(op, left_name, left, data.scalar_type(), p.tokens * p.rank);
  return p;
}

int64_t scratch_numel(int64_t tokens, int64_t cols, int64_t rank, int64_t token_slices,
                      bool with_gradient, bool with_u) {
  const int64_t gradient_slices = with_gradient ? token_slices : 0;
  const int64_t u_slices = with_u ? qlk::cuda::low_rank_u_parts(cols, rank, with_gradient) : 0;
  return (gradient_slices * cols + u_slices * tokens) * rank;
}

PartialSums gradient_sums(const char* op, const char* name, const LowRankGradientParams& p,
                          double scaling, const Tensor& out) {
  PartialSums sums;
  sums.partials = p.gradient_partials;
  sums.parts = p.token_slices;
  sums.rows = p.rank_major ? p.rank : p.cols;
  sums.cols = p.rank_major ? p.cols : p.rank;
  sums.scaling = static_cast<float>(scaling);
  sums.dtype = float_dtype(op, name, out);
  sums.out = write_cuda<void>(op, name, out, out.scalar_type(), p.cols * p.rank);
  return sums;
}

// u [M,R] of data's dtype. `extended` [M, C + T], perhaps columns of a wider matrix, becomes
// [data | u | 0]: data by the first launch, the rest by the one that adds the partial sums. T is R
// or more, or 0: then u is not in it.
PartialSums u_sums(const char* op, const char* name, LowRankGradientParams* p, double scaling,
                   const Tensor& u, const OptionalTensor& extended) {
  PartialSums sums;
  sums.partials = p->u_partials;
  sums.parts = qlk::cuda::low_rank_u_parts(p->cols, p->rank, p->left != nullptr);
  sums.rows = p->tokens;
  sums.cols = p->rank;
  sums.scaling = static_cast<float>(scaling);
  sums.dtype = p->dtype;
  const ScalarType dtype =
      p->dtype == qlk::DType::kFloat16 ? ScalarType::Half : ScalarType::BFloat16;
  sums.out = write_cuda<void>(op, name, u, dtype, p->tokens * p->rank);
  if (!extended) return sums;
  const int64_t width = extended->dim() == 2 ? extended->size(1) : 0;
  const int64_t stride = extended->dim() == 2 ? extended->stride(0) : 0;
  STD_TORCH_CHECK(extended->is_cuda() && extended->scalar_type() == dtype && extended->dim() == 2 &&
                      extended->size(0) == p->tokens && extended->stride(1) == 1 && stride >= width,
                  op, ": extended must be [", p->tokens, ", cols] of ", dtype_name(dtype),
                  ", rows of unit stride that do not overlap");
  STD_TORCH_CHECK(width == p->cols || width >= p->cols + p->rank, op, ": extended must have ",
                  p->cols, " columns, or at least ", p->cols + p->rank, ", got ", width);
  auto* first = static_cast<uint16_t*>(extended->mutable_data_ptr());
  p->copy = first;
  p->copy_stride = stride;
  if (width == p->cols) return sums;
  sums.tail = first + p->cols;
  sums.tail_stride = stride;
  sums.tail_cols = width - p->cols;
  return sums;
}

// grad_y [M,N], xa [M,R], lora_b [N,R]; u [M,R] of grad_y's dtype, grad_b [N,R] of any.
void adapter_gradients(const Tensor& grad_y, const Tensor& xa, const Tensor& lora_b, double scaling,
                       int64_t token_slices, const Tensor& u, const Tensor& grad_b,
                       const OptionalTensor& extended, const Tensor& scratch, int64_t stream) {
  constexpr const char* kOp = "adapter_gradients";
  LowRankGradientParams p = operands(kOp, "grad_y", grad_y, "xa", xa, token_slices);
  auto* partials =
      write_cuda<float>(kOp, "scratch", scratch, ScalarType::Float,
                        scratch_numel(p.tokens, p.cols, p.rank, token_slices, true, true));
  p.gradient_partials = partials;
  p.u_partials = partials + token_slices * p.cols * p.rank;
  p.right_dtype = float_dtype(kOp, "lora_b", lora_b);
  p.right = read_cuda<void>(kOp, "lora_b", lora_b, lora_b.scalar_type(), p.cols * p.rank);

  const PartialSums sums[2] = {gradient_sums(kOp, "grad_b", p, scaling, grad_b),
                               u_sums(kOp, "u", &p, scaling, u, extended)};
  const DeviceGuard guard(grad_y.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_low_rank_gradient(p, stream_pointer(stream)));
  check_cuda(kOp, qlk::cuda::launch_partial_sums(sums, 2, stream_pointer(stream)));
}

// out = scaling * dataᵀ left, [C,R], or [R,C] if rank_major; data [M,C], left [M,R].
void token_product(const Tensor& data, const Tensor& left, double scaling, int64_t token_slices,
                   bool rank_major, const Tensor& out, const Tensor& scratch, int64_t stream) {
  constexpr const char* kOp = "token_product";
  LowRankGradientParams p = operands(kOp, "data", data, "left", left, token_slices);
  p.rank_major = rank_major;
  p.gradient_partials =
      write_cuda<float>(kOp, "scratch", scratch, ScalarType::Float,
                        scratch_numel(p.tokens, p.cols, p.rank, token_slices, true, false));
  const PartialSums sums = gradient_sums(kOp, "out", p, scaling, out);
  const DeviceGuard guard(data.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_low_rank_gradient(p, stream_pointer(stream)));
  check_cuda(kOp, qlk::cuda::launch_partial_sums(&sums, 1, stream_pointer(stream)));
}

// out [M,R] = data adapterᵀ of data [M,C] and adapter [R,C], and data once more into `extended`.
void column_product(const Tensor& data, const Tensor& adapter, int64_t token_slices,
                    const Tensor& out, const OptionalTensor& extended, const Tensor& scratch,
                    int64_t stream) {
  constexpr const char* kOp = "column_product";
  STD_TORCH_CHECK(adapter.dim() == 2, kOp, ": adapter must be 2-D");
  LowRankGradientParams p = sizes(kOp, "data", data, adapter.size(0), token_slices);
  p.u_partials =
      write_cuda<float>(kOp, "scratch", scratch, ScalarType::Float,
                        scratch_numel(p.tokens, p.cols, p.rank, token_slices, false, true));
  p.right_rank_major = true;
  p.right_dtype = float_dtype(kOp, "adapter", adapter);
  p.right = read_cuda<void>(kOp, "adapter", adapter, adapter.scalar_type(), p.cols * p.rank);
  const PartialSums sums = u_sums(kOp, "out", &p, 1.0, out, extended);
  const DeviceGuard guard(data.get_device_index());
  check_cuda(kOp, qlk::cuda::launch_low_rank_gradient(p, stream_pointer(stream)));
  check_cuda(kOp, qlk::cuda::launch_partial_sums(&sums, 1, stream_pointer(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cuda, m) {
  m.def(
      "adapter_gradients(Tensor grad_y, Tensor xa, Tensor lora_b, float scaling, int token_slices, "
      "Tensor(a!) u, Tensor(b!) grad_b, Tensor(c!)? extended, Tensor(d!) scratch, int stream) -> "
      "()");
  m.def(
      "token_product(Tensor data, Tensor left, float scaling, int token_slices, bool rank_major, "
      "Tensor(a!) out, Tensor(b!) scratch, int stream) -> ()");
  m.def(
      "column_product(Tensor data, Tensor adapter, int token_slices, Tensor(a!) out, "
      "Tensor(b!)? extended, Tensor(c!) scratch, int stream) -> ()");
  m.def(
      "gradient_scratch(int tokens, int cols, int rank, int token_slices, bool with_gradient, "
      "bool with_u) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CUDA, m) {
  m.impl("adapter_gradients", TORCH_BOX(&adapter_gradients));
  m.impl("token_product", TORCH_BOX(&token_product));
  m.impl("column_product", TORCH_BOX(&column_product));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("gradient_scratch", TORCH_BOX(&scratch_numel));
}
