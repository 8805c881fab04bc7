"""dequantize and dequantize_many in CUDA: csrc/kernels/dequantize.cu, called by ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_kernels.backends.cuda.common import (
    current_stream,
    register_cuda_kernel,
    weight_arguments,
)
from qlora_kernels.formats.quantized_weight import WeightOperands


@register_cuda_kernel("dequantize")
def dequantize_cuda(
    operands: WeightOperands,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense weight of `shape` in fp32, fp16 or bf16; see `reference.dequantize_reference`.

    An `out` whose rows are contiguous (the last dimension of unit stride, the others uniform) is
    written in place; any other layout goes through a temporary.
    """
    result = operands.codes.new_empty(shape, dtype=dtype) if out is None else out
    rows = _as_rows(result)
    if rows is None:
        return result.copy_(dequantize_cuda(operands, shape, dtype))
    torch.ops.qlora_kernels_cuda.dequantize.default(
        *weight_arguments(operands, rows.shape[0], rows.shape[1]), rows, current_stream(rows)
    )
    return result


@register_cuda_kernel("dequantize_many")
def dequantize_many_cuda(
    operands: Sequence[WeightOperands],
    dtype: torch.dtype,
    outs: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """The dense weights, into `outs` where given; see `reference.dequantize_many_reference`.

    One launch takes up to 16 weights of any shapes, tables, block sizes and scale stores. A layout
    of `outs` that is not of rows takes a launch of its own.
    """
    results, together = [], []
    for weight, out in zip(operands, outs, strict=True):
        result = weight.codes.new_empty(weight.shape, dtype=dtype) if out is None else out
        results.append(result)
        rows = _as_rows(result)
        if rows is None:
            dequantize_cuda(weight, weight.shape, dtype, result)
        else:
            together.append((*weight_arguments(weight, *rows.shape), rows))
    if together:
        fields = [list(field) for field in zip(*together, strict=True)]
        torch.ops.qlora_kernels_cuda.dequantize_many.default(
            *fields, current_stream(together[0][-1])
        )
    return results


def _as_rows(dense: torch.Tensor) -> torch.Tensor | None:
    """`dense` as a 2-D view with unit stride along a row, or None if there is no such view."""
    if dense.is_contiguous():
        return dense.view(1, -1)
    rows_apart = dense.stride(0) >= dense.size(1) if dense.dim() == 2 else False
    return dense if rows_apart and dense.stride(1) == 1 else None
