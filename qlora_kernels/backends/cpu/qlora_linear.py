"""qlora_linear and its backward on the CPU: csrc/kernels_cpu/{low_rank,quantized_matmul*}.cpp."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cpu.common import contiguous, register_cpu_kernel, weight_arguments
from qlora_kernels.backends.cpu.dropout import dropout_cpu
from qlora_kernels.backends.cpu.explained import matmul_path
from qlora_kernels.backends.cpu.matmul_path import (
    Path,
    choose_path,
)
from qlora_kernels.backends.cpu.panels import (
    qlora_backward_by_panels,
    qlora_by_panels,
)
from qlora_kernels.backends.cpu.small_blocks import are_small
from qlora_kernels.formats.quantized_weight import WeightOperands


def qlora_path(
    isa: int,
    x: torch.Tensor,
    operands: WeightOperands,
    batch_invariant: bool = False,
    backward: bool = False,
) -> Path:
    """`choose_path` for x [M,K], and whether blocks are too small for it."""
    if are_small(operands.block_size):
        return "panels"
    rows, cols = operands.shape
    return choose_path(x.shape[0], rows, cols, x.dtype, isa, batch_invariant, backward)


@register_cpu_kernel("qlora_linear", path=matmul_path)
def qlora_linear_cpu(
    isa: int,
    x: torch.Tensor,
    operands: WeightOperands,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    batch_invariant: bool = False,
    xa: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M,N] and xa [M,R], which may be given; see `reference.qlora_linear_reference`."""
    x = contiguous(x)
    path = qlora_path(isa, x, operands, batch_invariant)
    dropped = dropout_cpu(isa, x, dropout_p, seed)
    if path == "panels":
        return qlora_by_panels(isa, x, dropped, operands, lora_a, lora_b, scaling, bias, xa)
    given = xa is not None
    if xa is None:
        xa = x.new_empty(x.shape[0], lora_a.shape[0])
    y = x.new_empty(x.shape[0], operands.shape[0])
    torch.ops.qlora_kernels_cpu.qlora_linear.default(
        x,
        None if given else dropped,
        *weight_arguments(operands),
        contiguous(lora_a),
        contiguous(lora_b),
        scaling,
        None if bias is None else contiguous(bias),
        y,
        xa,
        path == "tiles",
        isa,
    )
    return y, xa


@register_cpu_kernel("qlora_linear_backward", path=matmul_path)
def qlora_linear_backward_cpu(
    isa: int,
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
    u: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_x, grad_a, grad_b, empty where not needed; see `qlora_linear_backward_reference`.

    u = scaling·grad_y B [M,R] may be given.
    """
    grad_y, x = contiguous(grad_y), contiguous(x)
    path = qlora_path(isa, x, operands, backward=True)
    dropped = dropout_cpu(isa, x, dropout_p, seed) if needs[1] else x
    if path == "panels":
        return qlora_backward_by_panels(
            isa,
            grad_y,
            dropped,
            xa,
            operands,
            lora_a,
            lora_b,
            scaling,
            dropout_p,
            seed,
            needs,
            u,
        )
    grad_x, grad_a, grad_b = (
        like.new_empty(like.shape if needed else 0)
        for like, needed in zip((x, lora_a, lora_b), needs, strict=True)
    )
    if not any(needs):
        return grad_x, grad_a, grad_b
    torch.ops.qlora_kernels_cpu.qlora_linear_backward.default(
        grad_y,
        dropped,
        contiguous(xa),
        *weight_arguments(operands),
        contiguous(lora_a),
        contiguous(lora_b),
        scaling,
        dropout_p,
        seed if dropout_p else None,
        u,
        grad_x if needs[0] else None,
        grad_a if needs[1] else None,
        grad_b if needs[2] else None,
        path == "tiles",
        isa,
    )
    return grad_x, grad_a, grad_b
