"""What kernels and ops take of a quantized weight: tensors and plain numbers, no names.

A weight whose stored tensors kernels read as they are is a `WeightOperands`. Any other one (scales
in 16 bits, shifts, learned tables, dense packing) is a `StoredOperands`, which the ops convert or
compose when they use it; see `ops/stored.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.codebook import MAX_VALUES, constant_tensor
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.packing import dense_to_nibbles, n_blocks
from qlora_kernels.formats.scale_store import EIGHT_BIT_STORES, scale_table


class WeightOperands(NamedTuple):
    """A 2-D quantized weight as kernels take it: tensors and plain numbers, no names.

    codes u8 [ceil(N·K/2)]; either absmax fp32 [n_blocks], or scale_codes u8 [n_blocks],
    scale_absmax fp32 [ceil(n_blocks/scale_block_size)], scale_offset fp32 [1] and scale_codebook
    fp32 [256]; codebook fp32 [16], by code, unused entries NaN; shape (N, K).
    """

    codes: torch.Tensor
    absmax: torch.Tensor | None
    scale_codes: torch.Tensor | None
    scale_absmax: torch.Tensor | None
    scale_offset: torch.Tensor | None
    codebook: torch.Tensor
    scale_codebook: torch.Tensor | None
    shape: tuple[int, ...]
    block_size: int
    scale_block_size: int

    def flat(self) -> tuple[Any, ...]:
        """The fields as an inference call takes them: the shape as two numbers, the usual map of
        scales where none is stored."""
        *tensors, scale_codebook, (rows, cols), block_size, scale_block_size = self
        if scale_codebook is None and self.absmax is None:
            scale_codebook = dynamic8_table(self.codes.device)
        return (*tensors, scale_codebook, rows, cols, block_size, scale_block_size)


class StoredOperands(NamedTuple):
    """A 2-D quantized weight exactly as it is stored, of a format that is not `Format.plain`.

    codes u8, packed in `code_bits`; scales: absmax in the store's dtype, or scale_codes with
    scale_absmax and scale_offset where the store has them; shift likewise (all None: no shift);
    codebook fp32 [16], or learned: fp16 [L], or fp16 [N, L] for a table per row; shape (N, K).
    """

    codes: torch.Tensor
    absmax: torch.Tensor | None
    scale_codes: torch.Tensor | None
    scale_absmax: torch.Tensor | None
    scale_offset: torch.Tensor | None
    shift: torch.Tensor | None
    shift_codes: torch.Tensor | None
    shift_absmax: torch.Tensor | None
    shift_offset: torch.Tensor | None
    codebook: torch.Tensor
    shape: tuple[int, ...]
    block_size: int
    scale_block_size: int
    code_bits: int
    scale_store: str


def assemble_operands(
    fmt: Format,
    shape: tuple[int, ...],
    tensors: Mapping[str, torch.Tensor | None],
    codebook: torch.Tensor | None = None,
) -> WeightOperands | StoredOperands:
    """The operands of a weight from its stored tensors, by field of QuantizedWeight.

    codebook: the format's own table where the caller holds it, fp32 [16].
    """
    tables = tensors.get("tables")
    codes = tensors["codes"]
    assert codes is not None
    if codebook is None and tables is None:
        codebook = fmt.codebook.table(codes.device)
    if not fmt.plain:
        if tables is not None:
            codebook = tables.view(-1, len(fmt.codebook.values))
            codebook = codebook if fmt.lut_scope == "row" else codebook[0]
        assert codebook is not None
        return StoredOperands(
            codes=codes,
            absmax=tensors.get("absmax"),
            scale_codes=tensors.get("scale_codes"),
            scale_absmax=tensors.get("scale_absmax"),
            scale_offset=tensors.get("scale_offset"),
            shift=tensors.get("shift"),
            shift_codes=tensors.get("shift_codes"),
            shift_absmax=tensors.get("shift_absmax"),
            shift_offset=tensors.get("shift_offset"),
            codebook=codebook,
            shape=shape,
            block_size=fmt.block_size,
            scale_block_size=fmt.scale_block_size,
            code_bits=fmt.code_bits,
            scale_store=fmt.scale_store,
        )
    assert codebook is not None
    absmax, scale_codebook = tensors.get("absmax"), None
    rest: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
    if absmax is None:
        scale_codes = tensors["scale_codes"]
        assert scale_codes is not None
        scale_codebook = tensors.get("scale_codebook")
        if scale_codebook is None:
            scale_codebook = scale_table(fmt.scale_store, codes.device)
        rest = complete_scales(
            fmt.scale_store,
            scale_codes,
            tensors.get("scale_absmax"),
            tensors.get("scale_offset"),
            fmt.scale_block_size,
        )
    return WeightOperands(
        codes,
        absmax,
        *rest,
        codebook,
        scale_codebook,
        shape,
        fmt.block_size,
        fmt.scale_block_size,
    )


def complete_scales(
    scale_store: str,
    scale_codes: torch.Tensor,
    scale_absmax: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    scale_block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale_codes, and what goes with them as kernels take it: a second-level scale for every
    block of scales (1 where the store has none) and an offset (0)."""
    device = scale_codes.device
    if EIGHT_BIT_STORES[scale_store].second_level != "block":
        count = n_blocks(scale_codes.numel(), scale_block_size)
        if scale_absmax is None:
            scale_absmax = constant_tensor("one", (1.0,), torch.float32, device)
        scale_absmax = scale_absmax.expand(count).contiguous()
    if scale_offset is None:
        scale_offset = constant_tensor("zero", (0.0,), torch.float32, device)
    assert scale_absmax is not None
    return scale_codes, scale_absmax, scale_offset


def kernel_operands(stored: StoredOperands) -> WeightOperands:
    """What kernels take of a stored weight but for its shifts: codes of 4 bits, fp32 or 8-bit
    scales, fp32 [16] table.

    Raises:
        ArgumentError: the weight has a table per row.
    """
    if stored.codebook.dim() != 1:
        rule = "one table for the whole weight"
        raise argument_error("kernel_operands", "stored", rule, "a table per row")
    codes = stored.codes
    if stored.code_bits != 4:
        codes = dense_to_nibbles(codes, math.prod(stored.shape), stored.code_bits)
    absmax = None if stored.absmax is None else stored.absmax.to(torch.float32)
    scale_codes, scale_absmax, scale_offset = stored.scale_codes, None, None
    if scale_codes is not None:
        scale_codes, scale_absmax, scale_offset = complete_scales(
            stored.scale_store,
            scale_codes,
            stored.scale_absmax,
            stored.scale_offset,
            stored.scale_block_size,
        )
    return WeightOperands(
        codes,
        absmax,
        scale_codes,
        scale_absmax,
        scale_offset,
        padded_table(stored.codebook),
        None if absmax is not None else scale_table(stored.scale_store, codes.device),
        stored.shape,
        stored.block_size,
        stored.scale_block_size,
    )


def padded_table(table: torch.Tensor) -> torch.Tensor:
    """Tables [..., L] as fp32 [..., 16], NaN for the codes that have no value."""
    wide = table.to(torch.float32)
    missing = MAX_VALUES - wide.shape[-1]
    return F.pad(wide, (0, missing), value=math.nan) if missing else wide
