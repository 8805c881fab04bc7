"""quantized_matmul: y = x Ŵᵀ (+ bias) with x [M,K], weight [N,K], y [M,N]; its grad_x = grad_y Ŵ.

Rounding order: Ŵ = dequantize(weight) rounded to x's dtype; products and sums in fp32 (fp64 for
fp64 x); bias added there; one rounding to x's dtype.
"""

from __future__ import annotations

import torch

from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference.dequantize import dequantize_reference


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_weight(operands: WeightOperands, dtype: torch.dtype) -> torch.Tensor:
    """Ŵ [N,K]: rounded to `dtype`, held in the accumulation dtype."""
    return dequantize_reference(operands, operands.shape, dtype).to(accumulate_dtype(dtype))


def quantized_matmul_reference(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [M,K] times Ŵᵀ plus bias [N]. With batch_invariant each row is multiplied on its own."""
    weight = dense_weight(operands, x.dtype)
    rows = x.to(weight.dtype)
    if batch_invariant and len(rows):
        y = torch.stack([weight @ row for row in rows])
    else:
        y = rows @ weight.T
    if bias is not None:
        y = y + bias.to(weight.dtype)
    return y.to(x.dtype)


def quantized_matmul_backward_input_reference(
    grad_y: torch.Tensor, operands: WeightOperands
) -> torch.Tensor:
    """grad_x [M,K] = grad_y [M,N] Ŵ."""
    weight = dense_weight(operands, grad_y.dtype)
    return (grad_y.to(weight.dtype) @ weight).to(grad_y.dtype)
