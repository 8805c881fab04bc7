"""quantized_matmul and its grad_x on the CPU: csrc/kernels_cpu/quantized_matmul*.cpp."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cpu.common import contiguous, register_cpu_kernel, weight_arguments
from qlora_kernels.backends.cpu.explained import matmul_path
from qlora_kernels.backends.cpu.matmul_path import choose_path
from qlora_kernels.backends.cpu.panels import backward_by_panels, matmul_by_panels
from qlora_kernels.backends.cpu.small_blocks import are_small
from qlora_kernels.formats.quantized_weight import WeightOperands


@register_cpu_kernel("quantized_matmul", path=matmul_path)
def quantized_matmul_cpu(
    isa: int,
    x: torch.Tensor,
    operands: WeightOperands,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [M,K] times Ŵᵀ plus bias [N]; see `reference.quantized_matmul_reference`."""
    rows, cols = operands.shape
    x = contiguous(x)
    path = choose_path(x.shape[0], rows, cols, x.dtype, isa, batch_invariant)
    path = "panels" if are_small(operands.block_size) else path
    if path == "panels":
        return matmul_by_panels(isa, x, operands, bias)
    y = x.new_empty(x.shape[0], rows)
    torch.ops.qlora_kernels_cpu.quantized_matmul.default(
        x,
        *weight_arguments(operands),
        None if bias is None else contiguous(bias),
        y,
        path == "tiles",
        isa,
    )
    return y


@register_cpu_kernel("quantized_matmul_backward_input", path=matmul_path)
def quantized_matmul_backward_input_cpu(
    isa: int, grad_y: torch.Tensor, operands: WeightOperands
) -> torch.Tensor:
    """grad_y [M,N] times Ŵ; see `reference.quantized_matmul_backward_input_reference`."""
    rows, cols = operands.shape
    grad_y = contiguous(grad_y)
    path = choose_path(grad_y.shape[0], rows, cols, grad_y.dtype, isa, backward=True)
    path = "panels" if are_small(operands.block_size) else path
    if path == "panels":
        return backward_by_panels(isa, grad_y, operands)
    grad_x = grad_y.new_empty(grad_y.shape[0], cols)
    torch.ops.qlora_kernels_cpu.quantized_matmul_backward_input.default(
        grad_y, *weight_arguments(operands), grad_x, path == "tiles", isa
    )
    return grad_x
