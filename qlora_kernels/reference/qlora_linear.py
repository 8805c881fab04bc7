"""qlora_linear: y = x Ŵᵀ + scaling·(dropout(x) Aᵀ) Bᵀ + bias; x [M,K], weight [N,K], lora_a A
[R,K], lora_b B [N,R].

Rounding order: A and B rounded to x's dtype; xa = dropout(x)·Aᵀ summed in fp32 and rounded to x's
dtype; all terms of y summed in fp32 (fp64 for fp64 x), one rounding to x's dtype. Backward: u =
scaling·(grad_y B), rounded to x's dtype; grad_B = scaling·grad_yᵀ·xa; grad_A = uᵀ·dropout(x), both
rounded once to the adapter's own dtype; grad_x = grad_y Ŵ + dropout'(u A), one rounding.
"""

from __future__ import annotations

import torch

from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference.dropout import dropout_reference
from qlora_kernels.reference.quantized_matmul import accumulate_dtype, dense_weight


def qlora_linear_reference(
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
    """Return y [M,N] and xa [M,R], the only product the backward needs."""
    wide = accumulate_dtype(x.dtype)
    weight = dense_weight(operands, x.dtype)
    a, b = lora_a.to(x.dtype).to(wide), lora_b.to(x.dtype).to(wide)
    dropped = dropout_reference(x, dropout_p, seed).to(wide)
    rows = x.to(wide)
    if batch_invariant and len(x):
        xa = torch.stack([a @ row for row in dropped]).to(x.dtype)
        y = torch.stack([weight @ row for row in rows])
        y = y + scaling * torch.stack([b @ row for row in xa.to(wide)])
    else:
        xa = (dropped @ a.T).to(x.dtype)
        y = rows @ weight.T + scaling * (xa.to(wide) @ b.T)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype), xa


def qlora_linear_backward_reference(
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
    """grad_x [M,K], grad_a [R,K], grad_b [N,R]; `needs` says which, the others come back empty."""
    wide = accumulate_dtype(x.dtype)
    a, b = lora_a.to(x.dtype).to(wide), lora_b.to(x.dtype).to(wide)
    g = grad_y.to(wide)
    u = (scaling * (g @ b)).to(x.dtype).to(wide)
    grad_x, grad_a, grad_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if needs[0]:
        through_adapter = dropout_reference(u @ a, dropout_p, seed)
        grad_x = (g @ dense_weight(operands, x.dtype) + through_adapter).to(x.dtype)
    if needs[1]:
        grad_a = (u.T @ dropout_reference(x, dropout_p, seed).to(wide)).to(lora_a.dtype)
    if needs[2]:
        grad_b = (scaling * (g.T @ xa.to(wide))).to(lora_b.dtype)
    return grad_x, grad_a, grad_b
