"""dequantize with Triton, called by ops.dequantize and by the matmuls for many tokens;
dequantize_many, which takes up to `MOST_WEIGHTS` weights a launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
# Of one that first finds out whose elements they are, for up to a hundred instructions.
_MANY_TILE = 8192
_RAGGED_TILE = 1024
# Each takes a dozen arguments of a launch.
MOST_WEIGHTS = 8


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
    if _begins_at_blocks(operands, out):
        tile_blocks = _tile_blocks(_TILE, cols, block_size)
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


@register_triton_kernel("dequantize_many")
def dequantize_many_triton(
    operands: Sequence[WeightOperands],
    dtype: torch.dtype,
    outs: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """The dense weights, into `outs` where given; see `reference.dequantize_many_reference`.

    Weights that are stored alike (block sizes, scale store) share a launch; rows that begin inside
    a block, and a layout of `outs` that is not of rows, take one of their own.
    """
    results = []
    alike: dict[tuple[object, ...], list[tuple[WeightOperands, torch.Tensor]]] = {}
    for weight, out in zip(operands, outs, strict=True):
        result = weight.codes.new_empty(weight.shape, dtype=dtype) if out is None else out
        results.append(result)
        rows = _as_rows(result)
        if rows is None or not _begins_at_blocks(weight, rows):
            dequantize_triton(weight, weight.shape, dtype, result)
        elif rows.numel():
            stored = (weight.block_size, weight.scale_block_size, weight.absmax is None)
            alike.setdefault(stored, []).append((weight, rows))
    for group in alike.values():
        for begin in range(0, len(group), MOST_WEIGHTS):
            dequantize_many_launch(group[begin : begin + MOST_WEIGHTS]).run()
    return results


def dequantize_many_launch(group: Sequence[tuple[WeightOperands, torch.Tensor]]) -> Launch:
    """The one launch for non-empty weights that are stored alike, each with its out [rows, cols]:
    rows that begin at a block, with unit stride along them."""
    if len(group) == 1:
        return dequantize_launch(*group[0])
    each = [weight_arguments(weight) for weight, _ in group]
    arguments: dict[str, Any] = {
        # Absent scales are absent from all of them.
        f"{name}s": None if each[0][name] is None else tuple(one[name] for one in each)
        for name in each[0]
        if name.endswith("_ptr")
    }
    arguments |= {name: value for name, value in each[0].items() if not name.endswith("_ptr")}
    outs = [out for _, out in group]
    block_size, cols = group[0][0].block_size, [out.shape[1] for out in outs]
    # One tile for all: that of the largest weight, where it matters. Where rows are apart a smaller
    # one, which sticks out less over their ends.
    rows, largest = max(outs, key=torch.Tensor.numel).shape
    tile_blocks = _tile_blocks(_MANY_TILE if rows == 1 else _TILE, largest, block_size)
    tiles = [ceil_div(width, tile_blocks * block_size) for width in cols]
    firsts = [0]
    for out, per_row in zip(outs, tiles, strict=True):
        firsts.append(firsts[-1] + out.shape[0] * per_row)
    aligned = all(
        out.shape[1] % 32 == 0
        and out.stride(0) % 32 == 0
        and out.data_ptr() % 16 == 0
        and one["codes_ptr"].data_ptr() % 16 == 0
        for out, one in zip(outs, each, strict=True)
    )
    arguments |= {
        "out_ptrs": tuple(outs),
        "first_programs": tuple(firsts[:-1]),
        "cols": tuple(cols),
        "out_pitches": tuple(out.stride(0) for out in outs),
        "tiles_per_row": tuple(tiles),
        "TILE_BLOCKS": tile_blocks,
        "COUNT": len(group),
        "ALIGNED": aligned,
    }
    return Launch("dequantize._dequantize_many_kernel", (firsts[-1],), arguments)


def _begins_at_blocks(operands: WeightOperands, out: torch.Tensor) -> bool:
    """Whether every row of out [rows, cols] begins at a block of the weight."""
    return out.shape[0] == 1 or out.shape[1] % operands.block_size == 0


def _tile_blocks(tile: int, cols: int, block_size: int) -> int:
    """Blocks in `tile` elements; a row shorter than that takes a smaller one."""
    return max(1, min(tile // block_size, next_power_of_two(cols // block_size)))


def _as_rows(dense: torch.Tensor) -> torch.Tensor | None:
    """`dense` as a 2-D view with unit stride along a row, or None if there is no such view."""
    if dense.is_contiguous():
        return dense.view(1, -1)
    rows_apart = dense.stride(0) >= dense.size(1) if dense.dim() == 2 else False
    return dense if rows_apart and dense.stride(1) == 1 else None
