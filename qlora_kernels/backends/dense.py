"""The dense backend: the weight dequantized, and torch's own products in the order of stock layers.

Not for speed: to the bit what bitsandbytes' Linear4bit in training mode and PEFT's LoRA layer over
it compute, where the kernels, faster and as exact, add in another order. It is taken where it is
forced, with `qlora_kernels.backend("dense")` or QLK_BACKEND=dense; ops whose result is one to the
bit on every backend (quantize, dequantize, dropout) go on being chosen by priority.

Rounding order: y = F.linear(x, Ŵ, bias) in x's dtype; with an adapter, scaling times
F.linear(F.linear(dropout(x), lora_a), lora_b) in lora_a's dtype, rounded to x's and added to it;
gradients as autograd has them of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qlora_kernels.backends.registry import Problem, register_kernel, select
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference.qlora_group import (
    GroupGradients,
    GroupMember,
    MemberKernels,
    MemberNeeds,
    backward_by_members,
    forward_by_members,
)

# Below the reference, which rejects nothing: never chosen unless forced.
PRIORITY = -1


def _rejects(problem: Problem) -> str | None:
    return "a row of torch's products may depend on the others" if problem.batch_invariant else None


def _dense(operands: WeightOperands, dtype: torch.dtype) -> torch.Tensor:
    """Ŵ [N,K] by whichever kernel is the first choice."""
    out_features, in_features = operands.shape
    problem = Problem(
        "dequantize",
        operands.codes.device.type,
        dtype,
        in_features=out_features * in_features,
        block_size=operands.block_size,
        double_quant=operands.absmax is None,
    )
    dense: torch.Tensor = select(problem).fn(operands, operands.shape, dtype, None)
    return dense


def _dropped(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    if dropout_p == 0.0 or seed is None:
        return x
    problem = Problem("dropout", x.device.type, x.dtype, in_features=x.numel())
    dropped: torch.Tensor = select(problem).fn(x.contiguous(), dropout_p, seed)
    return dropped


@register_kernel("quantized_matmul", "dense", priority=PRIORITY, rejects=_rejects)
@torch.no_grad()
def quantized_matmul_dense(
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [M,K] times Ŵᵀ plus bias [N]."""
    return F.linear(x, _dense(operands, x.dtype), None if bias is None else bias.to(x.dtype))


@register_kernel("quantized_matmul_backward_input", "dense", priority=PRIORITY, rejects=_rejects)
@torch.no_grad()
def quantized_matmul_backward_input_dense(
    grad_y: torch.Tensor, operands: WeightOperands
) -> torch.Tensor:
    """grad_x [M,K] = grad_y [M,N] Ŵ."""
    return torch.matmul(grad_y, _dense(operands, grad_y.dtype))


@register_kernel("qlora_linear", "dense", priority=PRIORITY, rejects=_rejects)
@torch.no_grad()
def qlora_linear_dense(
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
    """y [M,N] and xa [M,R], which only has to be there: backward computes it anew, unrounded."""
    y = quantized_matmul_dense(x, operands, bias)
    xa = F.linear(_dropped(x.to(lora_a.dtype), dropout_p, seed), lora_a)
    through_adapter = F.linear(xa, lora_b.to(lora_a.dtype)) * scaling
    return y + through_adapter.to(x.dtype), xa.to(x.dtype)


@register_kernel("qlora_linear_backward", "dense", priority=PRIORITY, rejects=_rejects)
@torch.no_grad()
def qlora_linear_backward_dense(
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
    """grad_x, grad_a, grad_b, empty where not needed."""
    grad_x, grad_a, grad_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    wide = lora_a.dtype
    scaled = grad_y.to(wide) * scaling
    u = scaled @ lora_b.to(wide) if needs[0] or needs[1] else None
    if needs[0] and u is not None:
        through_adapter = _dropped(u @ lora_a, dropout_p, seed).to(x.dtype)
        grad_x = quantized_matmul_backward_input_dense(grad_y, operands) + through_adapter
    if needs[1] and u is not None:
        grad_a = u.t() @ _dropped(x.to(wide), dropout_p, seed)
    if needs[2]:
        xa = F.linear(_dropped(x.to(wide), dropout_p, seed), lora_a)
        grad_b = (scaled.t() @ xa).to(lora_b.dtype)
    return grad_x, grad_a, grad_b


_KERNELS = MemberKernels(
    quantized_matmul_dense,
    quantized_matmul_backward_input_dense,
    qlora_linear_dense,
    qlora_linear_backward_dense,
)


@register_kernel("qlora_group", "dense", priority=PRIORITY, rejects=_rejects)
@torch.no_grad()
def qlora_group_dense(
    x: torch.Tensor, members: Sequence[GroupMember], batch_invariant: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """y [M,N] of every member, and xa [M, sum of R]."""
    return forward_by_members(_KERNELS, x, members)


@register_kernel("qlora_group_backward", "dense", priority=PRIORITY, rejects=_rejects)
@torch.no_grad()
def qlora_group_backward_dense(
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x [M,K], grad_a [R,K] and grad_b [N,R] of every member."""
    return backward_by_members(_KERNELS, grad_ys, x, xa, members, needs)
