"""dequantize: packed codes and scales to a dense weight.

Rounding order: scale = fl(fl(map[q]·scale_absmax) + offset), two roundings and no fused
multiply-add; w = fl(table[code]·scale) in fp32; then one round-to-nearest-even to the output dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_kernels.formats.packing import unpack
from qlora_kernels.formats.quantized_weight import WeightOperands


def decode_scales_reference(operands: WeightOperands) -> torch.Tensor:
    """First-level scales fp32 [n_blocks], decoded when they are double-quantized."""
    if operands.absmax is not None:
        return operands.absmax
    assert operands.scale_codes is not None
    assert operands.scale_absmax is not None
    assert operands.scale_offset is not None
    assert operands.scale_codebook is not None
    per_scale = operands.scale_absmax.repeat_interleave(operands.scale_block_size)
    product = (
        operands.scale_codebook[operands.scale_codes.long()]
        * (per_scale[: operands.scale_codes.numel()])
    )
    return product + operands.scale_offset


def dequantize_reference(
    operands: WeightOperands,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense weight of `shape` in `dtype` (fp32, fp16, bf16; fp64 widens the fp32 value), into
    `out` if given."""
    numel = 1
    for size in shape:
        numel *= size
    codes = unpack(operands.codes, numel)
    scales = decode_scales_reference(operands).repeat_interleave(operands.block_size)[:numel]
    dense = (operands.codebook[codes.long()] * scales).to(dtype).reshape(shape)
    return dense if out is None else out.copy_(dense)


def dequantize_many_reference(
    operands: Sequence[WeightOperands],
    dtype: torch.dtype,
    outs: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Dense weights of their own shapes, each as `dequantize_reference` gives it."""
    return [
        dequantize_reference(weight, weight.shape, dtype, out)
        for weight, out in zip(operands, outs, strict=True)
    ]
