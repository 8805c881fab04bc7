"""dequantize on the CPU: csrc/kernels_cpu/dequantize*.cpp, called by ops.dequantize."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_kernels.backends.cpu.common import contiguous, register_cpu_kernel, scale_arguments
from qlora_kernels.backends.cpu.small_blocks import are_small, dequantize_small
from qlora_kernels.formats.quantized_weight import WeightOperands


@register_cpu_kernel("dequantize")
def dequantize_cpu(
    isa: int,
    operands: WeightOperands,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense weight of `shape` in fp32, fp16 or bf16; see `reference.dequantize_reference`.

    An `out` whose rows are contiguous (the last dimension of unit stride, the others uniform) is
    written in place; any other layout goes through a temporary.
    """
    if are_small(operands.block_size):
        small = dequantize_small(isa, operands, dtype).view(shape)
        return small if out is None else out.copy_(small)
    result = torch.empty(shape, dtype=dtype) if out is None else out
    rows = _as_rows(result)
    if rows is None:
        return result.copy_(dequantize_cpu(isa, operands, shape, dtype))
    torch.ops.qlora_kernels_cpu.dequantize.default(
        contiguous(operands.codes),
        *scale_arguments(operands),
        rows.shape[0],
        rows.shape[1],
        operands.block_size,
        operands.scale_block_size,
        rows,
        out is None,
        isa,
    )
    return result


@register_cpu_kernel("dequantize_many")
def dequantize_many_cpu(
    isa: int,
    operands: Sequence[WeightOperands],
    dtype: torch.dtype,
    outs: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """One weight after the other: a call costs little here, and each uses every thread."""
    return [
        dequantize_cpu(isa, weight, weight.shape, dtype, out)
        for weight, out in zip(operands, outs, strict=True)
    ]


def _as_rows(dense: torch.Tensor) -> torch.Tensor | None:
    """`dense` as a 2-D view with unit stride along a row, or None if there is no such view."""
    if dense.is_contiguous():
        return dense.view(1, -1)
    rows_apart = dense.stride(0) >= dense.size(1) if dense.dim() == 2 else False
    return dense if rows_apart and dense.stride(1) == 1 else None
