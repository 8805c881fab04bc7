"""What quantizing a weight costs: sums over one tensor, which add up to the figures of a set.

Sums are taken in fp64 over slices that stay in the processor's cache; the dense copy of a tensor
is the only thing of its size that is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.errors import argument_error
from qlora_kernels.formats import Format, QuantizedWeight
from qlora_kernels.formats.packing import dense_to_nibbles
from qlora_kernels.ops import dequantize, quantize

SLICE = 1 << 18
N_CODES = 16


@dataclass(frozen=True)
class Sums:
    """Of one tensor, or of several added up.

    Attributes:
        numel: weights.
        nbytes: of every stored tensor, so that bits are real ones.
        error_sq, weight_sq: Σ (Ŵ − W)² and Σ W².
        max_error: max |Ŵ − W|, in the weights' unit.
        code_counts: how often each code is stored, 16 numbers.
    """

    numel: int
    nbytes: int
    error_sq: float
    weight_sq: float
    max_error: float
    code_counts: tuple[int, ...]

    @classmethod
    def from_json(cls, cell: Mapping[str, Any]) -> Sums:
        """Inverse of `to_json`."""
        return cls(**{**cell, "code_counts": tuple(cell["code_counts"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fidelity:
    """Figures of a set of tensors under one format.

    Attributes:
        bits: stored bits a weight.
        relative_error: ‖Ŵ − W‖ / ‖W‖ over the whole set (Frobenius).
        nmse_db: 20 log10 of it; 6.02 dB are one bit.
        max_error: max |Ŵ − W|.
        code_entropy: bits of information a code carries, at most its width.
    """

    bits: float
    relative_error: float
    nmse_db: float
    max_error: float
    code_entropy: float


@torch.no_grad()
def measure(weight: Tensor, format: Format) -> tuple[Sums, Tensor]:
    """Quantize a weight and compare: the sums, and the dequantized weight in fp32.

    Raises ArgumentError as `quantize`, for values that are not finite.
    """
    qw = quantize(weight, format)
    dense = dequantize(qw, torch.float32)
    return compare(weight, qw, dense), dense


def compare(weight: Tensor, qw: QuantizedWeight, dense: Tensor) -> Sums:
    """The sums of a weight, what is stored of it, and what that stands for (fp32)."""
    error_sq = weight_sq = max_error = 0.0
    for original, held in zip(
        weight.reshape(-1).split(SLICE), dense.reshape(-1).split(SLICE), strict=True
    ):
        exact = original.float()
        error = held - exact
        error_sq += sum_of_squares(error)
        weight_sq += sum_of_squares(exact)
        max_error = max(max_error, float(error.abs_().max()))
    return Sums(qw.numel, qw.nbytes, error_sq, weight_sq, max_error, code_counts(qw))


def sum_of_squares(x: Tensor) -> float:
    """Σ x², in fp64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)


def code_counts(qw: QuantizedWeight) -> tuple[int, ...]:
    """How often each code is stored, the pad of an odd length left out."""
    bits, nibbles = qw.format.code_bits, qw.codes
    if bits != 4:
        nibbles = dense_to_nibbles(nibbles, qw.numel, bits)
    by_byte = torch.bincount(nibbles, minlength=N_CODES**2).view(N_CODES, N_CODES)
    counts = by_byte.sum(dim=1) + by_byte.sum(dim=0)  # high nibbles, low nibbles
    if qw.numel % 2:
        counts[int(nibbles[-1]) % N_CODES] -= 1
    return tuple(counts.tolist())


def add(parts: Iterable[Sums]) -> Sums:
    """The sums of several tensors."""
    parts = list(parts)
    return Sums(
        numel=sum(part.numel for part in parts),
        nbytes=sum(part.nbytes for part in parts),
        error_sq=math.fsum(part.error_sq for part in parts),
        weight_sq=math.fsum(part.weight_sq for part in parts),
        max_error=max(part.max_error for part in parts),
        code_counts=tuple(map(sum, zip(*(part.code_counts for part in parts), strict=True))),
    )


def fidelity(sums: Sums, of: str) -> Fidelity:
    """The figures; ``of`` names the set in the error.

    Raises ArgumentError where every weight is 0, against which no error is relative.
    """
    if sums.weight_sq == 0:
        raise argument_error("lab", "the weights", "not all 0", f"those of {of}")
    relative = math.sqrt(sums.error_sq / sums.weight_sq)
    return Fidelity(
        bits=8 * sums.nbytes / sums.numel,
        relative_error=relative,
        nmse_db=decibels(relative**2),
        max_error=sums.max_error,
        code_entropy=entropy(sums.code_counts),
    )


def decibels(ratio: float) -> float:
    """10 log10 of a ratio of powers; −999 stands for none at all, as JSON has no infinity."""
    return 10 * math.log10(ratio) if ratio > 0 else -999.0


def entropy(counts: Iterable[int]) -> float:
    """Of the distribution that these counts are of, in bits."""
    held = [count for count in counts if count]
    total = sum(held)
    return -sum(count / total * math.log2(count / total) for count in held) + 0.0
