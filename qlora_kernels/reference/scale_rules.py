"""Scale and shift rules: what a block's scale and shift are, before they are stored.

Everything in fp32 on float32(w). A block that holds NaN or Inf gets a NaN scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from qlora_kernels.formats.format import Format

_Reduce = Callable[[torch.Tensor], torch.Tensor]
# Multiples of absmax that the shifts "mse" and "entropy" may add to the median.
MOVED_SHIFTS = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15)


def per_block(flat: torch.Tensor, block_size: int, reduce: _Reduce) -> torch.Tensor:
    """reduce([blocks, size] -> [blocks]) over the blocks of a flat tensor; the last one may be
    short."""
    whole = flat.numel() // block_size * block_size
    parts = []
    if whole:
        parts.append(reduce(flat[:whole].view(-1, block_size)))
    if whole < flat.numel():
        parts.append(reduce(flat[whole:].view(1, -1)))
    return torch.cat(parts) if parts else flat.new_zeros(0)


def spread(per_block_values: torch.Tensor, block_size: int, numel: int) -> torch.Tensor:
    """[n_blocks] to [numel]: each block's value for every one of its elements."""
    return per_block_values.repeat_interleave(block_size)[:numel]


def _signed_absmax(rows: torch.Tensor) -> torch.Tensor:
    low, high = rows.aminmax(dim=1)
    return torch.where(high >= -low, high, low)


def scales_reference(flat: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Scales fp32 [n_blocks] by fmt.scale_rule of a flat fp32 weight, its shifts taken off."""
    values = fmt.codebook.values
    least, largest = min(values), max(values)

    def reduce(rows: torch.Tensor) -> torch.Tensor:
        if fmt.scale_rule == "signed_absmax":
            sign = 1.0 if largest >= -least else -1.0
            return _signed_absmax(rows) * sign
        if fmt.scale_rule == "minmax":
            low, high = rows.aminmax(dim=1)
            return (high - low) / (largest - least)
        if fmt.scale_rule == "rms":
            return rows.square().mean(dim=1).sqrt()
        absmax = rows.abs().amax(dim=1)
        if fmt.scale_rule == "power_of_two":
            # frexp: x = m·2^e with m in [0.5, 1), exact where log2 may round up.
            peak = math.frexp(max(-least, largest))[1]
            exponent = torch.frexp(absmax).exponent - peak
            powers = torch.ldexp(torch.ones_like(absmax), exponent)
            return torch.where(absmax.isfinite() & (absmax > 0), powers, absmax)
        return absmax

    scales = per_block(flat, fmt.block_size, reduce)
    return torch.where(scales.isfinite(), scales, torch.nan)


def shifts_reference(flat: torch.Tensor, fmt: Format) -> torch.Tensor | None:
    """Shifts fp32 [n_blocks] by fmt.shift of a flat fp32 weight; None where there are none.

    "mse" and "entropy" begin at the median; the encoder moves it.
    """
    if fmt.shift == "none":
        return None
    values = fmt.codebook.values
    least, largest = min(values), max(values)

    def reduce(rows: torch.Tensor) -> torch.Tensor:
        if fmt.shift == "min":
            low, high = rows.aminmax(dim=1)
            return low - (high - low) / (largest - least) * least
        if fmt.shift == "mean":
            return rows.mean(dim=1, dtype=torch.float64).to(torch.float32)
        return rows.median(dim=1).values

    return per_block(flat, fmt.block_size, reduce)
