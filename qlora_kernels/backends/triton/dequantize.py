"""dequantize with Triton, called by ops.dequantize and by the matmuls for many tokens."""

from __future__ import annotations

import torch

from qlora_kernels.backends.triton.common import (
    ceil_div,
    next_power_of_two,
    register_triton_kernel,
    weight_arguments,
)
from qlora_kernels.backends.triton.launch import Launch
from qlora_kernels.formats.quantized_weight import WeightOperands

# Elements of a program. A thread loads 16 bytes of codes, which are 32 elements.
_TILE = 4096
_RAGGED_TILE = 1024


@register_triton_kernel("dequantize")
def dequantize_triton(
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
        return result.copy_(dequantize_triton(operands, shape, dtype))
    if rows.numel():
        dequantize_launch(operands, rows).run()
    return result


def dequantize_launch(operands: WeightOperands, out: torch.Tensor) -> Launch:
    """The one launch into a non-empty `out` [rows, cols] with unit stride along a row."""
    rows, cols = out.shape
    arguments = weight_arguments(operands)
    arguments |= {"out_ptr": out, "cols": cols, "out_pitch": out.stride(0)}
    block_size = operands.block_size
    if rows == 1 or cols % block_size == 0:
        # A row shorter than a full tile takes a smaller one.
        tile_blocks = max(1, min(_TILE // block_size, next_power_of_two(cols // block_size)))
        tiles_per_row = ceil_div(cols, tile_blocks * block_size)
        arguments |= {
            "cols_bytes": ceil_div(cols, 2),
            "tiles_per_row": tiles_per_row,
            "TILE_BLOCKS": tile_blocks,
        }
        return Launch("dequantize._dequantize_kernel", (rows * tiles_per_row,), arguments)
    tiles_per_row = ceil_div(cols, _RAGGED_TILE)
    arguments |= {"tiles_per_row": tiles_per_row, "TILE": _RAGGED_TILE}
    return Launch("dequantize._dequantize_ragged_kernel", (rows * tiles_per_row,), arguments)


def _as_rows(dense: torch.Tensor) -> torch.Tensor | None:
    """`dense` as a 2-D view with unit stride along a row, or None if there is no such view."""
    if dense.is_contiguous():
        return dense.view(1, -1)
    rows_apart = dense.stride(0) >= dense.size(1) if dense.dim() == 2 else False
    return dense if rows_apart and dense.stride(1) == 1 else None
