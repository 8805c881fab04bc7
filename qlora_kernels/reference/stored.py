"""dequantize of weights that kernels do not take as they are stored (`StoredOperands`).

Rounding order: scale and shift decoded as in dequantize.py (16-bit ones widen exactly); w =
fl(fl(table[code]·scale) + shift) in fp32, no fused multiply-add; then one round-to-nearest-even to
the output dtype.
"""

from __future__ import annotations

import math

import torch

from qlora_kernels.formats.operands import StoredOperands, padded_table
from qlora_kernels.formats.packing import dense_to_nibbles, unpack
from qlora_kernels.reference.encode_scales import StoredScales, decode_stored_scales


def decode_stored_scales_reference(stored: StoredOperands) -> torch.Tensor:
    """Scales fp32 [n_blocks]."""
    scales = StoredScales(
        stored.absmax, stored.scale_codes, stored.scale_absmax, stored.scale_offset
    )
    return decode_stored_scales(stored.scale_store, scales, stored.scale_block_size)


def decode_shifts_reference(stored: StoredOperands) -> torch.Tensor | None:
    """Shifts fp32 [n_blocks], or None where the format has none."""
    if stored.shift is None and stored.shift_codes is None:
        return None
    shifts = StoredScales(
        stored.shift, stored.shift_codes, stored.shift_absmax, stored.shift_offset
    )
    return decode_stored_scales(stored.scale_store, shifts, stored.scale_block_size)


def dequantize_stored_reference(
    stored: StoredOperands, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense weight in `dtype` (fp32, fp16, bf16; fp64 widens the fp32 value), into `out` if
    given."""
    numel = math.prod(stored.shape)
    packed = stored.codes
    if stored.code_bits != 4:
        packed = dense_to_nibbles(packed, numel, stored.code_bits)
    codes = unpack(packed, numel).long()
    tables = padded_table(stored.codebook)
    if tables.dim() == 1:
        values = tables[codes]
    else:
        values = tables.gather(1, codes.view(tables.shape[0], -1 if numel else 0)).reshape(-1)
    scales = decode_stored_scales_reference(stored)
    dense = values * scales.repeat_interleave(stored.block_size)[:numel]
    shifts = decode_shifts_reference(stored)
    if shifts is not None:
        dense = dense + shifts.repeat_interleave(stored.block_size)[:numel]
    dense = dense.to(dtype).reshape(stored.shape)
    return dense if out is None else out.copy_(dense)
