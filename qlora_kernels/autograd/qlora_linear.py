"""qlora_linear: y = x Ŵᵀ + scaling·(dropout(x) Aᵀ) Bᵀ + bias, differentiable but for Ŵ."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_kernels.autograd.common import bias_gradient, rows_of, shaped_like
from qlora_kernels.autograd.quantized_matmul import restore_saved, save_weight
from qlora_kernels.autograd.stored_linear import StoredQLoRALinearFunction
from qlora_kernels.backends.kept import run_backward, run_forward
from qlora_kernels.formats.operands import StoredOperands, WeightOperands
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.ops.checks import (
    autocast_input,
    check_adapter,
    check_finite,
    check_parameter,
    check_probability,
    check_x,
    weight_operands,
)
from qlora_kernels.ops.dropout import draw_seed
from qlora_kernels.ops.inference import run_inference
from qlora_kernels.ops.library import runs_eagerly
from qlora_kernels.ops.qlora_linear import run_qlora_linear, run_qlora_linear_backward

_forward = torch.ops.qlora_kernels.qlora_linear.default
_backward = torch.ops.qlora_kernels.qlora_linear_backward.default


class QLoRALinearFunction(torch.autograd.Function):
    """y [M,N]. Saved for backward: x [M,K] and xa [M,R], beside the parameters, and Ŵ where that
    was requested (backends/kept.py).

    The dropout mask is a function of the seed, so backward makes it anew.
    """

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
        forward = run_qlora_linear if runs_eagerly(x) else _forward
        numbers = (scaling, bias, dropout_p, seed, batch_invariant)
        (y, xa), dense = run_forward(
            forward, ctx.needs_input_grad[0], x, *weight, lora_a, lora_b, *numbers
        )
        save_weight(ctx, weight, x, xa, lora_a, lora_b, seed, dense)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        result: torch.Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        weight, (x, xa, lora_a, lora_b, seed, dense) = restore_saved(ctx)
        needs = ctx.needs_input_grad[:3]
        grad_x = grad_a = grad_b = grad_bias = None
        if any(needs):
            backward = run_qlora_linear_backward if runs_eagerly(grad_y) else _backward
            grads = run_backward(
                backward,
                dense,
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
            grad_x, grad_a, grad_b = (
                grad if needed else None for grad, needed in zip(grads, needs, strict=True)
            )
        if ctx.needs_input_grad[3]:
            grad_bias = bias_gradient(grad_y, ctx.bias_dtype)
        absent = [None] * (4 + len(WeightOperands._fields))
        return grad_x, grad_a, grad_b, grad_bias, *absent


def qlora_linear(
    x: torch.Tensor,
    qw: QuantizedWeight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x Ŵᵀ + scaling·(dropout(x) lora_aᵀ) lora_bᵀ (+ bias), differentiable in all but Ŵ.

    Args:
        x: [..., K] fp32, fp16 or bf16 (fp64 on the reference); under autocast it is cast first.
        qw: a weight [N, K].
        lora_a: [R, K], lora_b: [N, R], fp32 or narrower. They are rounded to x's dtype to be
            multiplied; their gradients are rounded to their own.
        scaling: LoRA's alpha / R.
        bias: [N], fp32 or narrower.
        dropout_p: probability with which an element of x is dropped on its way into the adapter,
            when `training`. One 64-bit seed is drawn from the default generator of x's device.
        batch_invariant: see `quantized_linear`.

    Returns:
        [..., N] in x's dtype, summed in fp32.

    Raises:
        ArgumentTypeError: not a tensor or not a QuantizedWeight, a dtype that is not floating.
        ArgumentError: shapes, devices or numbers that do not fit.
        BackendError: a forced backend that cannot run the problem.
    """
    op = "qlora_linear"
    operands = weight_operands(op, qw)
    dropout_p = check_probability(op, "dropout_p", dropout_p)
    dropout_p = dropout_p if training else 0.0
    scaling = check_finite(op, "scaling", scaling)
    if dropout_p == 0.0 and not batch_invariant:
        y = run_inference(x, qw, bias, lora_a, lora_b, scaling)
        if y is not None:
            return y
    return qlora_linear_of(x, operands, lora_a, lora_b, scaling, bias, dropout_p, batch_invariant)


def qlora_linear_of(
    x: torch.Tensor,
    operands: WeightOperands | StoredOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout_p: float,
    batch_invariant: bool,
    op: str = "qlora_linear",
) -> torch.Tensor:
    """`qlora_linear` on operands that a module holds; dropout_p is 0 outside training."""
    out_features, in_features = operands.shape
    x = autocast_input(check_x(op, x, in_features, operands.codes.device))
    check_adapter(op, lora_a, lora_b, out_features, x)
    if bias is not None:
        check_parameter(op, "bias", bias, (out_features,), x)
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    rows = rows_of(x)
    if isinstance(operands, StoredOperands):
        y = StoredQLoRALinearFunction.apply(
            rows, lora_a, lora_b, bias, scaling, dropout_p, seed, batch_invariant, *operands
        )
    elif torch.is_grad_enabled():
        y = QLoRALinearFunction.apply(
            rows, lora_a, lora_b, bias, scaling, dropout_p, seed, batch_invariant, *operands
        )
    else:
        forward = run_qlora_linear if runs_eagerly(rows) else _forward
        y, _ = forward(
            rows, *operands, lora_a, lora_b, scaling, bias, dropout_p, seed, batch_invariant
        )
    return shaped_like(x, y)
