"""quantized_linear: y = x Ŵᵀ + bias, differentiable in x and bias. Nothing dense is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_kernels.autograd.common import bias_gradient, rows_of, shaped_like
from qlora_kernels.autograd.stored_linear import StoredMatmulFunction
from qlora_kernels.backends.kept import run_backward, run_forward
from qlora_kernels.formats.operands import StoredOperands, WeightOperands
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.ops.checks import autocast_input, check_parameter, check_x, weight_operands
from qlora_kernels.ops.inference import run_inference
from qlora_kernels.ops.library import runs_eagerly
from qlora_kernels.ops.quantized_matmul import (
    run_quantized_matmul,
    run_quantized_matmul_backward_input,
)

# The overloads themselves: finding them by name on every call takes microseconds.
_forward = torch.ops.qlora_kernels.quantized_matmul.default
_backward = torch.ops.qlora_kernels.quantized_matmul_backward_input.default


class QuantizedMatmulFunction(torch.autograd.Function):
    """y [M,N] = x [M,K] Ŵᵀ + bias [N]. Saved for backward: the weight's own tensors, and Ŵ where
    that was requested (backends/kept.py)."""

    # Not split into forward and setup_context: torch then binds the arguments by signature on
    # every call, which takes longer than everything else here.
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, batch_invariant: bool, *weight: Any
    ) -> torch.Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        forward = run_quantized_matmul if runs_eagerly(x) else _forward
        y: torch.Tensor
        y, dense = run_forward(forward, ctx.needs_input_grad[0], x, *weight, bias, batch_invariant)
        save_weight(ctx, weight, dense)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight, (dense,) = restore_saved(ctx)
            backward = run_quantized_matmul_backward_input if runs_eagerly(grad_y) else _backward
            grad_x = run_backward(backward, dense, grad_y, *weight)
        if ctx.needs_input_grad[1]:
            grad_bias = bias_gradient(grad_y, ctx.bias_dtype)
        return grad_x, grad_bias, None, *[None] * len(WeightOperands._fields)


def save_weight(ctx: Any, weight: tuple[Any, ...], *others: torch.Tensor | None) -> None:
    """Saves the weight's tensors, then `others`, and keeps its plain numbers on the context."""
    tensors = weight[: WeightOperands._fields.index("shape")]
    ctx.weight_numbers = weight[len(tensors) :]
    ctx.save_for_backward(*tensors, *others)


def restore_saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The weight as `save_weight` got it, and the others.

    To be called once a backward: activation checkpointing lets tensors be unpacked only once.
    """
    tensors, split = ctx.saved_tensors, WeightOperands._fields.index("shape")
    return (*tensors[:split], *ctx.weight_numbers), tensors[split:]


def quantized_linear(
    x: torch.Tensor,
    qw: QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x Ŵᵀ (+ bias), with the shapes of `torch.nn.functional.linear`; differentiable in x and bias.

    Args:
        x: [..., K] fp32, fp16 or bf16 (fp64 on the reference); under autocast it is cast first.
        qw: a weight [N, K].
        bias: [N], fp32 or narrower.
        batch_invariant: make a row of the result depend on its own row of x alone, bit for bit,
            whatever else is in the batch; large batches are slower then.

    Returns:
        [..., N] in x's dtype: Ŵ rounded to that dtype, summed in fp32, rounded once.

    Raises:
        ArgumentTypeError: not a tensor or not a QuantizedWeight, a dtype that is not floating.
        ArgumentError: shapes or devices that do not fit.
        BackendError: a forced backend that cannot run the problem.
    """
    if not batch_invariant and isinstance(qw, QuantizedWeight):
        y = run_inference(x, qw, bias)
        if y is not None:
            return y
    return quantized_linear_of(x, weight_operands("quantized_linear", qw), bias, batch_invariant)


def quantized_linear_of(
    x: torch.Tensor,
    operands: WeightOperands | StoredOperands,
    bias: torch.Tensor | None,
    batch_invariant: bool,
    op: str = "quantized_linear",
) -> torch.Tensor:
    """`quantized_linear` on operands that a module holds."""
    out_features, in_features = operands.shape
    x = autocast_input(check_x(op, x, in_features, operands.codes.device))
    if bias is not None:
        check_parameter(op, "bias", bias, (out_features,), x)
    rows = rows_of(x)
    if isinstance(operands, StoredOperands):
        y = StoredMatmulFunction.apply(rows, bias, batch_invariant, *operands)
    elif torch.is_grad_enabled():
        y = QuantizedMatmulFunction.apply(rows, bias, batch_invariant, *operands)
    else:
        forward = run_quantized_matmul if runs_eagerly(rows) else _forward
        y = forward(rows, *operands, bias, batch_invariant)
    return shaped_like(x, y)
