"""bof4, bof4s and their recipe: block-wise optimal float (Blumenberg, Graave, Fingscheidt,
"Improving Block-Wise LLM Quantization by 4-bit Block-Wise Optimal Float (BOF4)", 2025).

The table that errs least on normal weights in blocks of one size, with 0 and the place of a block's
maximum pinned. The signed one (BOF4-S) lets the scale carry the maximum's sign: one end of the
table is free then. "mse" is for squared error, "mae" for absolute error. The recipe at 3 and 2 bits
is bof3s and bof2s.
"""

from __future__ import annotations

import functools

from qlora_kernels.errors import argument_error
from qlora_kernels.formats.block_maximum import Criterion, optimal_table
from qlora_kernels.formats.codebook import Codebook
from qlora_kernels.formats.format import Format
from qlora_kernels.formats.optimal_tables import TABLES
from qlora_kernels.formats.registry import register_format

_SOURCE = "Blumenberg et al. 2025, solved anew"


@functools.cache
def bof(bits: int, block_size: int, signed: bool, criterion: Criterion = "mse") -> Codebook:
    """The table for a bit width and block size; those that are not stored are solved, in seconds.

    Args:
        bits: 2, 3 or 4.
        block_size: weights per scale.
        signed: for scales that carry the sign of the block's maximum.
        criterion: "mse" or "mae".

    Raises:
        ArgumentError: bits, or criterion, unknown.
    """
    if bits not in (2, 3, 4):
        raise argument_error("bof", "bits", "2, 3 or 4", repr(bits))
    if criterion not in ("mse", "mae"):
        raise argument_error("bof", "criterion", '"mse" or "mae"', repr(criterion))
    kind = f"bof{bits}{'s' if signed else ''}_{criterion}"
    values = TABLES.get(kind, {}).get(block_size)
    if values is None:
        pins = (0.0, 1.0) if signed else (-1.0, 0.0, 1.0)
        solved = optimal_table(2**bits, block_size, pins, criterion)
        values = tuple(round(value, 9) for value in solved)
    return Codebook(f"{kind}_{block_size}", values, source=_SOURCE)


def bof4(block_size: int) -> Codebook:
    """bof(4, block_size, signed=False)."""
    return bof(4, block_size, False)


def bof4s(block_size: int) -> Codebook:
    """bof(4, block_size, signed=True)."""
    return bof(4, block_size, True)


def bof4s_mae(block_size: int) -> Codebook:
    """bof(4, block_size, signed=True, criterion="mae")."""
    return bof(4, block_size, True, "mae")


def bof3s(block_size: int) -> Codebook:
    """bof(3, block_size, signed=True)."""
    return bof(3, block_size, True)


def bof2s(block_size: int) -> Codebook:
    """bof(2, block_size, signed=True)."""
    return bof(2, block_size, True)


register_format(Format("bof4", codebook=bof4))  # type: ignore[arg-type]  # a rule
for _rule in (bof4s, bof4s_mae, bof3s, bof2s):
    register_format(
        Format(
            _rule.__name__,
            codebook=_rule,  # type: ignore[arg-type]  # a rule
            scale_rule="signed_absmax",
            scale_store="sign7",
            pack="nibble" if "4" in _rule.__name__ else "dense",
        )
    )
