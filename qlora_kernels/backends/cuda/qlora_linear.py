"""qlora_linear and its backward in CUDA: the fused kernel for few tokens, else Ŵ in scratch.

There the adapter is further columns of Ŵ (forward) or rows (backward), so that one cuBLAS GEMM sums
all of a result in fp32 and rounds it once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qlora_kernels.backends.cuda.common import contiguous, register_cuda_kernel
from qlora_kernels.backends.cuda.dequantize import dequantize_cuda
from qlora_kernels.backends.cuda.dropout import dropout_cuda
from qlora_kernels.backends.cuda.low_rank import (
    down_projection,
    product_with_b,
    project_into,
    token_product,
    u_and_grad_b,
)
from qlora_kernels.backends.cuda.matmul_path import choose_path, matmul_rejects
from qlora_kernels.backends.cuda.quantized_matmul import fused_matmul, sizes_of
from qlora_kernels.backends.cuda.scratch import dense_scratch
from qlora_kernels.formats.quantized_weight import WeightOperands

# Columns of a GEMM operand begin at 16-byte boundaries: cuBLAS is slow otherwise.
_RANK_STEP = 8


@register_cuda_kernel("qlora_linear", rejects=matmul_rejects)
def qlora_linear_cuda(
    x: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M,N] and xa [M,R]; see `reference.qlora_linear_reference`."""
    x = contiguous(x.detach())
    dropped = dropout_cuda(x, dropout_p, seed)
    if choose_path(sizes_of(x, operands, batch_invariant)) == "fused":
        xa = down_projection(dropped, lora_a)
        return fused_matmul(x, operands, bias, xa, lora_b, scaling), xa
    extended = x.new_empty(len(x), x.shape[1] + padded_rank(len(lora_a)))
    # The adapter's x is another one where elements are dropped.
    projected = project_into(x, lora_a, extended) if dropped is x else None
    if projected is None:
        xa = F.linear(dropped, lora_a.detach().to(x.dtype))
        write_extended(x, xa, extended)
    else:
        xa = projected
    return extended_forward(extended, operands, lora_b.detach(), scaling, bias), xa


@register_cuda_kernel("qlora_linear_backward", rejects=matmul_rejects)
def qlora_linear_backward_cuda(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    xa: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x, grad_a, grad_b, empty where not needed; see `qlora_linear_backward_reference`."""
    grad_x, grad_a, grad_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    grad_y, masked = grad_y.detach(), seed is not None and dropout_p > 0.0
    u = extended = None
    is_extended = False
    if needs[0] and not masked:
        extended = grad_y.new_empty(len(grad_y), grad_y.shape[1] + padded_rank(len(lora_a)))
    if needs[2] and (needs[0] or needs[1]):
        u, grad_b, is_extended = u_and_grad_b(grad_y, xa, lora_b, scaling, extended)
    elif needs[2]:
        grad_b = token_product(grad_y, xa, scaling, lora_b.dtype)
    elif needs[0] or needs[1]:
        u = product_with_b(grad_y, lora_b, scaling)
    if needs[0] and u is not None:
        if extended is None:
            grad_x = masked_backward(grad_y, operands, u, lora_a.detach(), dropout_p, seed)
        else:
            if not is_extended:
                write_extended(grad_y, u, extended)
            grad_x = extended_backward(extended, operands, lora_a.detach())
    if needs[1] and u is not None:
        dropped = dropout_cuda(x.detach(), dropout_p, seed)
        grad_a = token_product(dropped, u, 1.0, lora_a.dtype, rank_major=True)
    return grad_x, grad_a, grad_b


def padded_rank(rank: int) -> int:
    """Columns or rows that an adapter takes in an extended GEMM operand."""
    return -(-rank // _RANK_STEP) * _RANK_STEP


def extended_forward(
    extended: torch.Tensor,
    operands: WeightOperands,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """[x | xa | 0] · [Ŵ | scaling·B | 0]ᵀ + bias, [M,N]."""
    (rows, cols), rank = operands.shape, lora_b.shape[1]
    weight = dense_scratch(rows, extended.shape[1], extended)
    dequantize_cuda(operands, operands.shape, extended.dtype, weight[:, :cols])
    # In fp32, so that the product is rounded once, like B itself where scaling is a power of two.
    weight[:, cols : cols + rank] = lora_b.to(extended.dtype).float() * scaling
    weight[:, cols + rank :] = 0
    return F.linear(extended, weight, None if bias is None else bias.detach().to(extended.dtype))


def write_extended(left: torch.Tensor, low_rank: torch.Tensor, extended: torch.Tensor) -> None:
    """extended = [left | low_rank | 0]."""
    cols, rank = left.shape[1], low_rank.shape[1]
    extended[:, :cols] = left
    extended[:, cols : cols + rank] = low_rank
    extended[:, cols + rank :] = 0


def extended_backward(
    extended: torch.Tensor, operands: WeightOperands, lora_a: torch.Tensor
) -> torch.Tensor:
    """[grad_y | u | 0] · [Ŵ ; A ; 0], [M,K]."""
    (rows, cols), rank = operands.shape, len(lora_a)
    weight = dense_scratch(extended.shape[1], cols, extended)
    dequantize_cuda(operands, operands.shape, extended.dtype, weight[:rows])
    weight[rows : rows + rank] = lora_a
    weight[rows + rank :] = 0
    return extended @ weight


def masked_backward(
    grad_y: torch.Tensor,
    operands: WeightOperands,
    u: torch.Tensor,
    lora_a: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """grad_y Ŵ + mask(u A), [M,K]: the mask applies to u A alone, so it is a GEMM of its own."""
    rows, cols = operands.shape
    weight = dense_scratch(rows, cols, grad_y)
    dequantize_cuda(operands, operands.shape, grad_y.dtype, weight)
    through_adapter = dropout_cuda(u @ lora_a.to(grad_y.dtype), dropout_p, seed)
    return (grad_y @ weight).add_(through_adapter)
