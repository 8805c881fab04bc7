"""qlora_linear and its backward in CUDA: the fused kernel for few tokens, else Ŵ in scratch.

There the adapter is further columns of Ŵ (forward) or rows (backward), so that one cuBLAS GEMM sums
all of a result in fp32 and rounds it once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qlora_kernels.backends.cuda.common import contiguous, current_stream, register_cuda_kernel
from qlora_kernels.backends.cuda.dequantize import dequantize_cuda
from qlora_kernels.backends.cuda.dropout import dropout_cuda
from qlora_kernels.backends.cuda.matmul_path import choose_path, matmul_rejects
from qlora_kernels.backends.cuda.quantized_matmul import at_vector, fused_matmul, sizes_of
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
    xa = F.linear(dropped, lora_a.detach().to(x.dtype))
    return extended_forward(x, operands, xa, lora_b.detach(), scaling, bias), xa


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
    u = None
    if needs[0] or needs[1]:
        # alpha scales the fp32 sums: one rounding.
        b = lora_b.detach().to(x.dtype)
        u = torch.addmm(grad_y.new_empty(()), grad_y, b, beta=0, alpha=scaling)
    if needs[0] and u is not None:
        grad_x = extended_backward(grad_y, operands, u, lora_a.detach(), dropout_p, seed)
    if needs[1] and u is not None:
        grad_a = (u.t() @ dropout_cuda(x.detach(), dropout_p, seed)).to(lora_a.dtype)
    if needs[2]:
        product = torch.addmm(grad_y.new_empty(()), grad_y.t(), xa, beta=0, alpha=scaling)
        grad_b = product.to(lora_b.dtype)
    return grad_x, grad_a, grad_b


def down_projection(x: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
    """x [M,K] · adapterᵀ [R,K], rounded to x's dtype; a token's bits do not depend on M."""
    result = x.new_empty(len(x), len(adapter))
    torch.ops.qlora_kernels_cuda.down_projection.default(
        at_vector(x), contiguous(adapter.detach()), result, current_stream(x)
    )
    return result


def extended_forward(
    x: torch.Tensor,
    operands: WeightOperands,
    xa: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """[x | xa] · [Ŵ | scaling·B]ᵀ + bias, [M,N]."""
    tokens, (rows, cols), rank = len(x), operands.shape, lora_b.shape[1]
    padded = -(-rank // _RANK_STEP) * _RANK_STEP
    weight = dense_scratch(rows, cols + padded, x)
    dequantize_cuda(operands, operands.shape, x.dtype, weight[:, :cols])
    # In fp32, so that the product is rounded once, like B itself where scaling is a power of two.
    weight[:, cols : cols + rank] = lora_b.to(x.dtype).float() * scaling
    weight[:, cols + rank :] = 0
    extended = x.new_empty(tokens, cols + padded)
    extended[:, :cols] = x
    extended[:, cols : cols + rank] = xa
    extended[:, cols + rank :] = 0
    return F.linear(extended, weight, None if bias is None else bias.detach().to(x.dtype))


def extended_backward(
    grad_y: torch.Tensor,
    operands: WeightOperands,
    u: torch.Tensor,
    lora_a: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """[grad_y | u] · [Ŵ ; A], [M,K]; with dropout the mask applies to u A alone, which is added."""
    tokens, (rows, cols), rank = len(grad_y), operands.shape, len(lora_a)
    a = lora_a.to(grad_y.dtype)
    if seed is not None and dropout_p > 0.0:
        weight = dense_scratch(rows, cols, grad_y)
        dequantize_cuda(operands, operands.shape, grad_y.dtype, weight)
        return (grad_y @ weight).add_(dropout_cuda(u @ a, dropout_p, seed))
    padded = -(-rank // _RANK_STEP) * _RANK_STEP
    weight = dense_scratch(rows + padded, cols, grad_y)
    dequantize_cuda(operands, operands.shape, grad_y.dtype, weight[:rows])
    weight[rows : rows + rank] = a
    weight[rows + rank :] = 0
    extended = grad_y.new_empty(tokens, rows + padded)
    extended[:, :rows] = grad_y
    extended[:, rows : rows + rank] = u
    extended[:, rows + rank :] = 0
    return extended @ weight
