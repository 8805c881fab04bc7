"""experts_linear: y = x Ŵ_eᵀ + scaling·(x A_eᵀ) B_eᵀ, the expert e of a row by its place.

Differentiable in x, A and B. Saved for backward is the stack as it is stored, and with an adapter
x and the product with A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.operands import StoredOperands
from qlora_kernels.ops.checks import autocast_input, check_x

_SPLIT = StoredOperands._fields.index("shape")
_ABSENT = (None,) * len(StoredOperands._fields)


class ExpertsMatmulFunction(torch.autograd.Function):
    """y [M,N]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: torch.Tensor, *weight: Any) -> torch.Tensor:
        ctx.save_for_backward(counts, *weight[:_SPLIT])
        ctx.numbers = weight[_SPLIT:]
        y: torch.Tensor = torch.ops.qlora_kernels.experts_matmul(x, counts, *weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            backward = torch.ops.qlora_kernels.experts_matmul_backward_input
            grad_x = backward(grad_y.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        return grad_x, None, *_ABSENT


class ExpertsQLoRALinearFunction(torch.autograd.Function):
    """y [M,N]; saved beside the stack: x [M,K] and xa [M,R]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        counts: torch.Tensor,
        *weight: Any,
    ) -> torch.Tensor:
        y, xa = torch.ops.qlora_kernels.experts_qlora_linear(
            x, counts, *weight, lora_a, lora_b, scaling
        )
        ctx.save_for_backward(counts, *weight[:_SPLIT], x, xa, lora_a, lora_b)
        ctx.numbers, ctx.scaling = weight[_SPLIT:], scaling
        result: torch.Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        counts, *tensors, x, xa, lora_a, lora_b = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads: tuple[Any, ...] = (None, None, None)
        if any(needs):
            weight = (*tensors, *ctx.numbers)
            results = torch.ops.qlora_kernels.experts_qlora_linear_backward(
                grad_y.contiguous(), x, xa, counts, *weight, lora_a, lora_b, ctx.scaling, needs
            )
            grads = tuple(
                grad if needed else None for grad, needed in zip(results, needs, strict=True)
            )
        return *grads, None, None, *_ABSENT


def experts_linear(
    x: torch.Tensor,
    counts: torch.Tensor,
    weight: StoredOperands,
    adapter: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    op: str = "experts_linear",
) -> torch.Tensor:
    """Each expert's matrix, and adapter if there is one, times the rows of x that are its own.

    Args:
        x: [M, K], the rows of expert 0 first, then those of 1 and so on, then those of none.
        counts: int64 [experts + 1] on the CPU: so many rows each.
        weight: a stack of experts' matrices: every tensor [experts, …], the codebook too or one
            for all [16]; shape that of one matrix, (N, K).
        adapter: A [experts, R, K], B [experts, N, R] and the scaling.

    Returns:
        [M, N] in x's dtype; zeros in rows of no expert.

    Raises:
        ArgumentError, ArgumentTypeError: an x, or an adapter, that does not fit.
    """
    out_features, in_features = weight.shape
    x = autocast_input(check_x(op, x, in_features, weight.codes.device)).contiguous()
    if adapter is None:
        plain: torch.Tensor = ExpertsMatmulFunction.apply(x, counts, *weight)
        return plain
    lora_a, lora_b, scaling = adapter
    experts, rank = weight.codes.shape[0], lora_a.shape[1]
    for name, factor, size in (
        ("lora_a", lora_a, (experts, rank, in_features)),
        ("lora_b", lora_b, (experts, out_features, rank)),
    ):
        if tuple(factor.shape) != size:
            raise argument_error(op, name, f"{list(size)}", list(factor.shape))
    y: torch.Tensor = ExpertsQLoRALinearFunction.apply(x, lora_a, lora_b, scaling, counts, *weight)
    return y
