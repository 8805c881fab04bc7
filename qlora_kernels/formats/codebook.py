"""Codebook: the 2 to 16 values of a 4-bit format by code, and the boundaries between them.

Kernels never see a codebook's name: they get the table (decode) and the boundaries with the codes
of each rank (encode).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from qlora_kernels.errors import argument_error

MAX_VALUES = 16
TieRule = Literal["lower", "sign_magnitude"]


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _next_below(value: float) -> float:
    """Largest fp32 strictly below `value`: turns `n >= value` into `n > _next_below(value)`."""
    tensor = torch.tensor(value, dtype=torch.float32)
    return float(torch.nextafter(tensor, torch.tensor(-math.inf)))


@dataclass(frozen=True)
class Encoder:
    """What a quantize kernel needs: rank = number of boundaries strictly below n, code =
    rank_codes[rank].

    boundaries: ascending, len(rank_codes) - 1 of them; fp32 values, or exact fp64 midpoints for
        "decoded" encoding.
    zero_code: the code whose value is nearest to 0 (a tie goes to the lower value).
    """

    boundaries: tuple[float, ...]
    rank_codes: tuple[int, ...]
    zero_code: int


@dataclass(frozen=True)
class Codebook:
    """The values of a format in code order.

    Args:
        name: the name a `Format` made from it is registered under.
        values: 2 … 16 finite numbers by code, rounded to fp32; normalised so that a block's absmax
            maps to ±1 is
            the custom, not a rule. Duplicates are legal: the lower code is the one that is written.
        tie: "lower": a normalised weight exactly between two values takes the lower value.
            "sign_magnitude": 16 values, code c + 8 the negative of code c; a tie takes the smaller
            magnitude
            (bitsandbytes' FP4).
        source: where the numbers come from.

    Raises:
        ArgumentError: fewer than 2 or more than 16 values, a non-finite value, all values equal,
        or a
            sign_magnitude table that is not one.
    """

    name: str
    values: Sequence[float]
    tie: TieRule = "lower"
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        values = tuple(float(v) for v in self.values)
        if not 2 <= len(values) <= MAX_VALUES:
            raise argument_error("Codebook", "values", "2 to 16 numbers", f"{len(values)} numbers")
        for v in values:
            if not math.isfinite(v) or abs(v) > torch.finfo(torch.float32).max:
                raise argument_error("Codebook", "values", "finite in float32", v)
        values = tuple(_float32(v) for v in values)
        object.__setattr__(self, "values", values)
        if min(values) == max(values):
            raise argument_error("Codebook", "values", "at least two different numbers", values)
        if self.tie not in ("lower", "sign_magnitude"):
            raise argument_error("Codebook", "tie", '"lower" or "sign_magnitude"', repr(self.tie))
        if self.tie == "sign_magnitude":
            half = MAX_VALUES // 2
            mirrored = len(values) == MAX_VALUES and all(
                values[c] >= 0 and values[c + half] == -values[c] for c in range(half)
            )
            if not mirrored or values[0] != 0 or len(set(values[:half])) != half:
                raise argument_error(
                    "Codebook",
                    "values",
                    "eight distinct magnitudes from 0 up, then their negatives",
                    values,
                )

    @cached_property
    def zero_code(self) -> int:
        """The code nearest to 0; a tie goes to the lower value, then to the lower code."""
        values = self.values
        return min(range(len(values)), key=lambda c: (abs(values[c]), values[c], c))

    @cached_property
    def content_hash(self) -> str:
        """sha256 of the little-endian fp32 values and the tie rule; the name does not matter."""
        payload = struct.pack(f"<{len(self.values)}f", *self.values) + self.tie.encode()
        return hashlib.sha256(payload).hexdigest()

    @cached_property
    def padded(self) -> tuple[float, ...]:
        """The 16 entries kernels decode with; a code without a value decodes to NaN."""
        return tuple(self.values) + (math.nan,) * (MAX_VALUES - len(self.values))

    def _ranked_codes(self) -> list[int]:
        """Codes in ascending order of value, of equal values only the lowest code."""
        first: dict[float, int] = {}
        for code, value in enumerate(self.values):
            first.setdefault(value, code)
        return [first[value] for value in sorted(first)]

    @cached_property
    def encoder(self) -> Encoder:
        """fp32 boundaries for n = w / absmax: midpoints in value order, ties by `tie`."""
        if self.tie == "sign_magnitude":
            half = MAX_VALUES // 2
            magnitude_codes = sorted(range(half), key=lambda c: self.values[c])
            thresholds = [
                _float32((self.values[a] + self.values[b]) / 2)
                for a, b in itertools.pairwise(magnitude_codes)
            ]
            # |n| > t moves away from zero: below zero, n = -t already belongs to the upper one.
            negative = [_next_below(-t) for t in reversed(thresholds)]
            codes = [c + half for c in reversed(magnitude_codes)] + magnitude_codes
            return Encoder((*negative, _next_below(0.0), *thresholds), tuple(codes), self.zero_code)
        codes = self._ranked_codes()
        boundaries = tuple(
            _float32((self.values[a] + self.values[b]) / 2) for a, b in itertools.pairwise(codes)
        )
        return Encoder(boundaries, tuple(codes), self.zero_code)

    @cached_property
    def exact_encoder(self) -> Encoder:
        """Exact fp64 midpoints, a tie to the lower value: for encoding against decoded scales."""
        codes = self._ranked_codes()
        boundaries = tuple(
            (self.values[a] + self.values[b]) / 2 for a, b in itertools.pairwise(codes)
        )
        return Encoder(boundaries, tuple(codes), self.zero_code)

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The padded table as a shared fp32 tensor [16] on `device`; do not write to it."""
        return constant_tensor(self.padded, self.padded, torch.float32, torch.device(device))


_constants: dict[tuple[Hashable, torch.dtype, torch.device], torch.Tensor] = {}


def constant_tensor(
    key: Hashable, values: Sequence[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`values` as a tensor made once per (key, dtype, device) and shared; do not write to it.

    While torch traces, a tensor of its own: what is made then is not real. What is made in
    inference mode could never be saved for a backward, so it is made outside.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return torch.tensor(values, dtype=dtype, device=device)
    found = _constants.get((key, dtype, device))
    if found is None:
        with torch.inference_mode(False):
            found = torch.tensor(values, dtype=dtype, device=device)
        _constants[key, dtype, device] = found
    return found
