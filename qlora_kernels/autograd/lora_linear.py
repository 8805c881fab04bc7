"""lora_linear: the same adapter over a dense weight, y = x Wᵀ + scaling·(dropout(x) Aᵀ) Bᵀ + bias.

Plain LoRA, with QLoRA's economy: x and the M×R product are all that is saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qlora_kernels.autograd.common import bias_gradient, rows_of, shaped_like
from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.ops.checks import (
    autocast_input,
    check_adapter,
    check_finite,
    check_parameter,
    check_probability,
    check_x,
)
from qlora_kernels.ops.dropout import draw_seed


def _dropped(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    if seed is None:
        return x
    dropped: torch.Tensor = torch.ops.qlora_kernels.dropout(x, dropout_p, seed)
    return dropped


class LoRALinearFunction(torch.autograd.Function):
    """y [M,N]. Saved for backward: x [M,K] and xa [M,R], beside the parameters.

    Adapters are rounded to x's dtype, each GEMM is torch's; adapter gradients are summed by the
    GEMM in fp32 and rounded to x's dtype, then widened to the adapter's own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> torch.Tensor:
        xa = _dropped(x, dropout_p, seed) @ lora_a.to(x.dtype).t()
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(xa, lora_b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, xa, weight, lora_a, lora_b, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        x, xa, weight, lora_a, lora_b, seed = ctx.saved_tensors
        need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        grad_x = grad_weight = grad_a = grad_b = grad_bias = None
        if need_x or need_a:
            u = (grad_y @ lora_b.to(x.dtype)).mul_(ctx.scaling)
        if need_x:
            a = lora_a.to(x.dtype)
            grad_x = grad_y @ weight.to(x.dtype)
            if seed is None:
                grad_x.addmm_(u, a)
            else:
                grad_x += _dropped(u @ a, ctx.dropout_p, seed)
        if need_weight:
            grad_weight = (grad_y.t() @ x).to(weight.dtype)
        if need_a:
            grad_a = (u.t() @ _dropped(x, ctx.dropout_p, seed)).to(lora_a.dtype)
        if need_b:
            grad_b = (grad_y.t() @ xa).to(lora_b.dtype).mul_(ctx.scaling)
        if need_bias:
            grad_bias = bias_gradient(grad_y, ctx.bias_dtype)
        return grad_x, grad_weight, grad_a, grad_b, grad_bias, None, None, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> torch.Tensor:
    """x Wᵀ + scaling·(dropout(x) lora_aᵀ) lora_bᵀ (+ bias) over a dense weight [N, K].

    Arguments, dropout and result are those of `qlora_linear`; differentiable in every tensor. A
    weight of another dtype is rounded to x's for the product.

    Raises:
        ArgumentTypeError: not a tensor, a dtype that is not floating.
        ArgumentError: shapes, devices or numbers that do not fit.
    """
    op = "lora_linear"
    if not isinstance(weight, torch.Tensor):
        raise type_error(op, "weight", "a tensor", type(weight).__name__)
    if not weight.is_floating_point() or weight.dim() != 2:
        got = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise argument_error(op, "weight", "a floating-point tensor [out_features, K]", got)
    out_features, in_features = weight.shape
    x = autocast_input(check_x(op, x, in_features, weight.device))
    check_adapter(op, lora_a, lora_b, out_features, x)
    if bias is not None:
        check_parameter(op, "bias", bias, (out_features,), x)
    scaling = check_finite(op, "scaling", scaling)
    dropout_p = check_probability(op, "dropout_p", dropout_p) if training else 0.0
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    y = LoRALinearFunction.apply(rows_of(x), weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
    return shaped_like(x, y)
