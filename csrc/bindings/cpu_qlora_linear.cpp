// torch.ops.qlora_kernels_cpu.qlora_linear and qlora_linear_backward
#include "adapter_utils.h"
#include "qlk/convert.h"
#include "qlk/dropout.h"

namespace {

using namespace qlk::bindings;

// Rows of xa or u [tokens, rank] in fp32, padded with zeros.
void load_left(const Tensor& product, qlk::DType dtype, int64_t tokens, int64_t rank, qlk::Isa isa,
               float* left) {
  const int64_t padded = qlk::padded_rank(rank);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = left + t * padded;
    qlk::load_f32(product.const_data_ptr(), dtype, t * rank, rank, isa, row);
    std::fill(row + rank, row + padded, 0.0f);
  }
}

// `dropped` is x after dropout, x itself if there is none; without it xa is given, else written.
void qlora_linear(const Tensor& x, const OptionalTensor& dropped, QLK_WEIGHT_PARAMETERS,
                  const Tensor& lora_a, const Tensor& lora_b, double scaling,
                  const OptionalTensor& bias, const Tensor& y, const Tensor& xa, bool tiles,
                  int64_t isa_level) {
  constexpr const char* kOp = "qlora_linear";
  const qlk::Isa isa = checked_isa(kOp, isa_level);
  qlk::QuantizedMatmulParams p;
  p.weight = quantized_view(kOp, QLK_WEIGHT_ARGUMENTS);
  set_operands(kOp, "x", x, cols, "y", y, rows, &p);
  set_bias(kOp, bias, rows, &p);
  const qlk::AdapterView a = view_of_a(kOp, lora_a, cols);
  const qlk::AdapterView b = view_of_b(kOp, lora_b, rows, a.rank);
  if (dropped) check_operand(kOp, "dropped", *dropped, x.scalar_type(), x.numel());
  check_operand(kOp, "xa", xa, x.scalar_type(), p.tokens * a.rank);
  if (p.tokens == 0) return;

  float* left = left_scratch(kOp, p.tokens, a.rank);
  if (dropped) {
    project(kOp, dropped->const_data_ptr(), p.dtype, p.tokens, a, 1.0f, tiles, isa, left);
    for (int64_t t = 0; t < p.tokens; ++t)
      qlk::store_f32(left + t * qlk::padded_rank(a.rank), a.rank, p.dtype, isa,
                     qlk::element_at(xa.mutable_data_ptr(), p.dtype, t * a.rank));
  } else {
    load_left(xa, p.dtype, p.tokens, a.rank, isa, left);
  }
  set_low_rank(b, left, static_cast<float>(scaling), &p);
  check_status(kOp, run_forward(p, tiles, isa));
}

// Gradients that are None are not needed; u = scaling grad_y B [tokens, rank] may be given.
void qlora_linear_backward(const Tensor& grad_y, const Tensor& dropped, const Tensor& xa,
                           QLK_WEIGHT_PARAMETERS, const Tensor& lora_a, const Tensor& lora_b,
                           double scaling, double dropout_p, const OptionalTensor& seed,
                           const OptionalTensor& u_given, const OptionalTensor& grad_x,
                           const OptionalTensor& grad_a, const OptionalTensor& grad_b, bool tiles,
                           int64_t isa_level) {
  constexpr const char* kOp = "qlora_linear_backward";
  const qlk::Isa isa = checked_isa(kOp, isa_level);
  const qlk::DType dtype = float_dtype(kOp, "grad_y", grad_y);
  const int64_t tokens = check_rows(kOp, "grad_y", grad_y, rows);
  const qlk::AdapterView a = view_of_a(kOp, lora_a, cols);
  const qlk::AdapterView b = view_of_b(kOp, lora_b, rows, a.rank);

  if (grad_b) {
    check_operand(kOp, "xa", xa, grad_y.scalar_type(), tokens * a.rank);
    check_operand(kOp, "grad_b", *grad_b, lora_b.scalar_type(), rows * a.rank);
    float* left = left_scratch(kOp, tokens, a.rank);
    load_left(xa, dtype, tokens, a.rank, isa, left);
    qlk::AdapterView gradient = b;
    gradient.data = grad_b->mutable_data_ptr();
    sum_gradient(kOp, left, grad_y.const_data_ptr(), dtype, tokens, static_cast<float>(scaling),
                 gradient, tiles, isa);
  }
  if (!grad_x && !grad_a) return;

  float* u = left_scratch(kOp, tokens, a.rank);
  if (u_given) {
    check_operand(kOp, "u", *u_given, grad_y.scalar_type(), tokens * a.rank);
    load_left(*u_given, dtype, tokens, a.rank, isa, u);
  } else {
    project(kOp, grad_y.const_data_ptr(), dtype, tokens, b, static_cast<float>(scaling), tiles, isa,
            u);
  }
  if (grad_a) {
    check_operand(kOp, "dropped", dropped, grad_y.scalar_type(), tokens * cols);
    check_operand(kOp, "grad_a", *grad_a, lora_a.scalar_type(), cols * a.rank);
    qlk::AdapterView gradient = a;
    gradient.data = grad_a->mutable_data_ptr();
    sum_gradient(kOp, u, dropped.const_data_ptr(), dtype, tokens, 1.0f, gradient, tiles, isa);
  }
  if (grad_x) {
    qlk::QuantizedMatmulParams p;
    p.weight = quantized_view(kOp, QLK_WEIGHT_ARGUMENTS);
    set_operands(kOp, "grad_y", grad_y, rows, "grad_x", *grad_x, cols, &p);
    set_low_rank(a, u, 1.0f, &p);
    if (seed)
      p.low_rank.mask = qlk::dropout_mask(
          dropout_p, *read_operand<int64_t>(kOp, "seed", *seed, ScalarType::Long, 1));
    check_status(kOp, run_backward(p, tiles, isa));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_cpu, m) {
  m.def("qlora_linear(Tensor x, Tensor? dropped, " QLK_WEIGHT_SCHEMA
        ", Tensor lora_a, Tensor lora_b, float scaling, Tensor? bias, Tensor(a!) y, "
        "Tensor(b!) xa, bool tiles, int isa) -> ()");
  m.def("qlora_linear_backward(Tensor grad_y, Tensor dropped, Tensor xa, " QLK_WEIGHT_SCHEMA
        ", Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, Tensor? seed, "
        "Tensor? u, Tensor(a!)? grad_x, Tensor(b!)? grad_a, Tensor(c!)? grad_b, bool tiles, int "
        "isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_cpu, CPU, m) {
  m.impl("qlora_linear", TORCH_BOX(&qlora_linear));
  m.impl("qlora_linear_backward", TORCH_BOX(&qlora_linear_backward));
}
