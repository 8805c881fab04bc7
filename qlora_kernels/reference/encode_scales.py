"""Scales (or shifts) to a scale store, and what they decode to.

8-bit rounding order: offset = float32(mean in fp64), or the smallest; c = scale - offset in fp32;
second = max|c| / the table's peak over the values that share it; n = c / max(second, 2^-126); code
= nearest table value to n by fp32 midpoints, a tie to the lower one (e4m3: to even, as hardware
does). `double_quant` is the op double_quantize.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlora_kernels.formats.operands import complete_scales
from qlora_kernels.formats.packing import n_blocks
from qlora_kernels.formats.scale_store import (
    EIGHT_BIT_STORES,
    FLOAT_STORES,
    TABLE_VALUES,
    scale_table,
)
from qlora_kernels.reference.quantize import SMALLEST_NORMAL


class StoredScales(NamedTuple):
    """Scales as they are stored: `whole` in a 16- or 32-bit dtype, or `codes` with the
    second-level scales and offset that the store has."""

    whole: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    second: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def encode_scales_reference(
    store: str,
    scales: torch.Tensor,
    scale_block_size: int,
    second: torch.Tensor | None = None,
) -> StoredScales:
    """Scales fp32 [n_blocks] to any store but double_quant.

    NaN stays NaN, and where values share a second-level scale or an offset makes NaN of them all.

    Args:
        store: its name.
        scales: fp32 [n_blocks].
        scale_block_size: scales that share a second-level scale, where blocks of them do.
        second: e4m3's second-level scale fp32 [1], when it is already settled.
    """
    if store in FLOAT_STORES:
        return StoredScales(whole=scales.to(FLOAT_STORES[store]))
    layout = EIGHT_BIT_STORES[store]
    count = scales.numel()
    offset = None
    if layout.offset != "none":
        offset = scales.new_zeros(1)
        if count:
            reduced = scales.double().mean() if layout.offset == "mean" else scales.amin()
            offset = reduced.to(torch.float32).view(1)
        scales = scales - offset
    size = {"block": scale_block_size, "tensor": max(count, 1), "none": 1}[layout.second_level]
    blocks = n_blocks(count, size)
    padded = scales.new_zeros(blocks * size)
    padded[:count] = scales
    padded = padded.view(blocks, size)
    if layout.second_level == "none":
        return StoredScales(codes=_nearest(store, scales))
    if second is None:
        second = padded.abs().amax(dim=1) / layout.peak if blocks else scales.new_zeros(blocks)
        if not blocks and layout.second_level == "tensor":
            second = scales.new_zeros(1)
    normalised = padded / second.clamp(min=SMALLEST_NORMAL)[:blocks, None]
    return StoredScales(
        codes=_nearest(store, normalised.reshape(-1)[:count]), second=second, offset=offset
    )


def _nearest(store: str, values: torch.Tensor) -> torch.Tensor:
    if store == "e4m3":
        peak = EIGHT_BIT_STORES[store].peak
        rounded = values.clamp(-peak, peak).to(torch.float8_e4m3fn).view(torch.uint8)
        # -0 has a code of its own, which a re-encoded weight would not meet again.
        return torch.where(rounded == 0x80, torch.zeros_like(rounded), rounded)
    table = TABLE_VALUES[store]
    first: dict[float, int] = {}
    for code, value in enumerate(table):
        if value == value:  # not NaN
            first.setdefault(value + 0.0, code)
    ascending = sorted(first)
    points = torch.tensor(ascending, dtype=torch.float32, device=values.device)
    ranked = torch.tensor(
        [first[value] for value in ascending], dtype=torch.uint8, device=values.device
    )
    midpoints = points[:-1] + (points[1:] - points[:-1]) * 0.5
    codes = ranked[torch.searchsorted(midpoints, values.contiguous(), right=False)]
    # Only a store without a second-level scale has to say NaN in its codes.
    nan_code = next((code for code, value in enumerate(table) if value != value), 0)
    return torch.where(values.isnan(), codes.new_full((), nan_code), codes)


def decode_stored_scales(store: str, stored: StoredScales, scale_block_size: int) -> torch.Tensor:
    """The scales fp32 [n_blocks] that dequantize will see."""
    if stored.whole is not None:
        return stored.whole.to(torch.float32)
    assert stored.codes is not None
    codes, second, offset = complete_scales(
        store, stored.codes, stored.second, stored.offset, scale_block_size
    )
    per_scale = second.repeat_interleave(scale_block_size)[: codes.numel()]
    return scale_table(store, codes.device)[codes.long()] * per_scale + offset
