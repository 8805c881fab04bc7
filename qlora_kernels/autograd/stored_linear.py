"""quantized_linear and qlora_linear on `StoredOperands`: the same Functions over the stored_* ops.

Saved for backward is the weight as it is stored, and what the plain Functions save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_kernels.autograd.common import bias_gradient
from qlora_kernels.formats.operands import StoredOperands

_SPLIT = StoredOperands._fields.index("shape")
_ABSENT = (None,) * len(StoredOperands._fields)


class StoredMatmulFunction(torch.autograd.Function):
    """y [M,N] = x [M,K] Ŵᵀ + bias [N]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, batch_invariant: bool, *weight: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(*weight[:_SPLIT])
        ctx.numbers = weight[_SPLIT:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        y: torch.Tensor = torch.ops.qlora_kernels.stored_matmul(x, *weight, bias, batch_invariant)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = (*ctx.saved_tensors, *ctx.numbers)
            grad_x = torch.ops.qlora_kernels.stored_matmul_backward_input(grad_y, *weight)
        if ctx.needs_input_grad[1]:
            grad_bias = bias_gradient(grad_y, ctx.bias_dtype)
        return grad_x, grad_bias, None, *_ABSENT


class StoredQLoRALinearFunction(torch.autograd.Function):
    """y [M,N] of qlora_linear; saved beside the weight: x [M,K] and xa [M,R]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        dropout_p: float,
        seed: torch.Tensor | None,
        batch_invariant: bool,
        *weight: Any,
    ) -> torch.Tensor:
        y, xa = torch.ops.qlora_kernels.stored_qlora_linear(
            x, *weight, lora_a, lora_b, scaling, bias, dropout_p, seed, batch_invariant
        )
        ctx.save_for_backward(*weight[:_SPLIT], x, xa, lora_a, lora_b, seed)
        ctx.numbers = weight[_SPLIT:]
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        result: torch.Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        x, xa, lora_a, lora_b, seed = saved[_SPLIT:]
        weight = (*saved[:_SPLIT], *ctx.numbers)
        needs = ctx.needs_input_grad[:3]
        grads: tuple[Any, ...] = (None, None, None)
        if any(needs):
            results = torch.ops.qlora_kernels.stored_qlora_linear_backward(
                grad_y,
                x,
                xa,
                *weight,
                lora_a,
                lora_b,
                ctx.scaling,
                ctx.dropout_p,
                seed,
                list(needs),
            )
            grads = tuple(
                grad if needed else None for grad, needed in zip(results, needs, strict=True)
            )
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = bias_gradient(grad_y, ctx.bias_dtype)
        return *grads, grad_bias, None, None, None, None, *_ABSENT
