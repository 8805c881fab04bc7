"""quantize for every format beyond bitsandbytes' way: rules, searched scales, stores, learned
tables.

The order: shift, stored and read back; scale of what is left by the rule; the encoder's search;
scale stored and read back; a learned table; codes nearest to the weight under what dequantize will
see. Codes come from the op `quantize`, so from the kernel of the weight's device.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.codebook import MAX_VALUES, Encoder, constant_tensor
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.packing import pack_dense, unpack
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.formats.scale_store import FLOAT_STORES
from qlora_kernels.ops.search import ScaleSearch, search_scales
from qlora_kernels.reference.encode_scales import (
    StoredScales,
    decode_stored_scales,
    encode_scales_reference,
)
from qlora_kernels.reference.learn_tables import codes_by_row, learn_tables
from qlora_kernels.reference.scale_rules import (
    MOVED_SHIFTS,
    per_block,
    scales_reference,
    shifts_reference,
    spread,
)


def encoder_tensors(
    encoder: Encoder, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundaries in `dtype` and rank codes u8, shared: not to be written."""
    boundaries, codes = encoder.boundaries, encoder.rank_codes
    return (
        constant_tensor(boundaries, boundaries, dtype, device),
        constant_tensor(codes, codes, torch.uint8, device),
    )


def nearest_codes(
    w: torch.Tensor, scales: torch.Tensor, fmt: Format, table: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes u8 [ceil(numel/2)], nibbles, nearest to w under decoded scales fp32 [n_blocks] and the
    format's table, or one that was learned, fp16 [L] and ascending."""
    if table is None:
        exact, ranks = encoder_tensors(fmt.codebook.exact_encoder, torch.float64, w.device)
        zero_code = fmt.codebook.zero_code
    else:
        wide = table.double()
        exact = (wide[1:] + wide[:-1]) / 2
        ranks = torch.arange(len(wide), dtype=torch.uint8, device=w.device)
        zero_code = int(wide.abs().argmin())
    codes: torch.Tensor = torch.ops.qlora_kernels.quantize(
        w, exact, ranks, zero_code, fmt.block_size, scales
    )[0]
    return codes


def store_scales(
    fmt: Format, scales: torch.Tensor, second: torch.Tensor | None = None
) -> StoredScales:
    """Scales fp32 [n_blocks] as the format's store holds them."""
    if fmt.double_quant:
        return StoredScales(
            None,
            *torch.ops.qlora_kernels.double_quantize(
                scales, dynamic8_table(scales.device), fmt.scale_block_size
            ),
        )
    return encode_scales_reference(fmt.scale_store, scales, fmt.scale_block_size, second)


def scale_parts(fmt: Format, scales: torch.Tensor, check_finite: bool) -> dict[str, Any]:
    """The stored tensors of scales fp32 [n_blocks], by field of QuantizedWeight.

    Raises:
        ArgumentError: scales that the store cannot hold.
    """
    stored = store_scales(fmt, scales)
    decoded = decode_stored_scales(fmt.scale_store, stored, fmt.scale_block_size)
    _check_store(fmt, scales, decoded, check_finite)
    return {
        name: part for name, part in _named("absmax", "scale", stored).items() if part is not None
    }


def encode(
    w: torch.Tensor, fmt: Format, importance: torch.Tensor | None, check_finite: bool
) -> QuantizedWeight:
    """Quantize a finite weight, or one that may hold NaN and Inf where check_finite is off.

    importance: fp32, of w's shape: what an element's squared error counts, for searches and
    learners.

    Raises:
        ArgumentError: scales that the store cannot hold.
    """
    weights = None if importance is None else importance.reshape(-1)
    fields: dict[str, torch.Tensor | None] = {}
    flat = w.reshape(-1)
    shifts = shifts_reference(flat.to(torch.float32), fmt)
    residual = flat
    if shifts is not None:
        if fmt.shift in ("mse", "entropy"):
            shifts = _moved_shifts(flat.to(torch.float32), shifts, fmt, weights)
        stored = store_scales(fmt, shifts)
        fields |= _named("shift", "shift", stored)
        decoded = decode_stored_scales(fmt.scale_store, stored, fmt.scale_block_size)
        _check_store(fmt, shifts, decoded, check_finite)
        residual = flat.to(torch.float32) - spread(decoded, fmt.block_size, flat.numel())
    scales = _scales(residual, fmt)
    second = None
    if fmt.encoder != "nearest":
        scales, second = search_scales(fmt, residual, scales, weights, nearest_codes)
    stored = store_scales(fmt, scales, second)
    fields |= _named("absmax", "scale", stored)
    decoded = decode_stored_scales(fmt.scale_store, stored, fmt.scale_block_size)
    _check_store(fmt, scales, decoded, check_finite)
    if fmt.lut_scope != "global":
        tables = learn_tables(residual.view(w.shape), decoded, fmt, importance)
        fields["tables"] = tables.reshape(-1)
    if fmt.lut_scope == "row":
        codes = codes_by_row(residual.view(w.shape), decoded, tables, fmt)
    else:
        table = None if fmt.lut_scope == "global" else tables[0]
        codes = nearest_codes(residual, decoded, fmt, table)
        if fmt.code_bits != 4:
            codes = pack_dense(unpack(codes, flat.numel()), fmt.code_bits)
    parts: dict[str, Any] = {name: part for name, part in fields.items() if part is not None}
    return QuantizedWeight(codes=codes, shape=tuple(w.shape), dtype=w.dtype, format=fmt, **parts)


def _scales(residual: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The rule's scales; absmax is what the op quantize finds in passing."""
    if fmt.scale_rule != "absmax":
        return scales_reference(residual.to(torch.float32), fmt)
    boundaries, ranks = encoder_tensors(fmt.codebook.encoder, torch.float32, residual.device)
    absmax: torch.Tensor = torch.ops.qlora_kernels.quantize(
        residual, boundaries, ranks, fmt.codebook.zero_code, fmt.block_size
    )[1]
    return absmax


def _named(whole: str, prefix: str, stored: StoredScales) -> dict[str, torch.Tensor | None]:
    return {
        whole: stored.whole,
        f"{prefix}_codes": stored.codes,
        f"{prefix}_absmax": stored.second,
        f"{prefix}_offset": stored.offset,
    }


def _check_store(
    fmt: Format, chosen: torch.Tensor, decoded: torch.Tensor, check_finite: bool
) -> None:
    """Refuse scales that overflow in a 16-bit store."""
    if not check_finite or fmt.scale_store not in FLOAT_STORES or decoded.numel() == 0:
        return
    if not bool(decoded.isfinite().all()):
        limit = torch.finfo(FLOAT_STORES[fmt.scale_store]).max
        got = float(chosen.abs().nan_to_num(torch.inf).max())
        rule = f"of scales that {fmt.scale_store} holds (at most {limit:g})"
        raise argument_error("quantize", "w", rule, got)


def _moved_shifts(
    flat: torch.Tensor, shifts: torch.Tensor, fmt: Format, importance: torch.Tensor | None
) -> torch.Tensor:
    """For each block the best of shift + f·absmax, f in MOVED_SHIFTS: by squared error, or by the
    entropy of its codes."""
    numel, size = flat.numel(), fmt.block_size
    reach = per_block(flat - spread(shifts, size, numel), size, lambda rows: rows.abs().amax(dim=1))
    best, least = shifts, torch.full_like(shifts, torch.inf)
    for factor in MOVED_SHIFTS:
        candidate = shifts + factor * reach
        residual = flat - spread(candidate, size, numel)
        scales = scales_reference(residual, fmt)
        if fmt.shift == "mse":
            search = ScaleSearch(fmt, residual, scales, importance, nearest_codes)
            loss = search.error(scales)
        else:
            loss = -_entropy(nearest_codes(residual, scales, fmt), numel, size)
        best = torch.where(loss < least, candidate, best)
        least = torch.minimum(loss, least)
    return best


def _entropy(codes: torch.Tensor, numel: int, block_size: int) -> torch.Tensor:
    """Entropy of each block's codes in bits, fp32 [n_blocks]."""

    def reduce(rows: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros(rows.shape[0], MAX_VALUES, device=rows.device)
        counts.scatter_add_(1, rows.long(), torch.ones_like(rows))
        shares = counts / rows.shape[1]
        bits: torch.Tensor = torch.special.xlogy(shares, shares).sum(dim=1)
        return bits / -math.log(2.0)

    return per_block(unpack(codes, numel).to(torch.float32), block_size, reduce)
