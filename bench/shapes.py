"""The problem that every speed is stated for, its operands in enough copies to miss the caches."""

from __future__ import annotations

import math

import torch

import qlora_kernels as qlk
from qlora_kernels.testing.timing import Rotation

# One attention projection of a 7-billion-parameter model, [N, K].
WEIGHT = (4096, 4096)
BLOCK_SIZE = 64
FORMAT = "nf4"
DTYPE = torch.bfloat16


def dense_weights(shape: tuple[int, int] = WEIGHT, dtype: torch.dtype = DTYPE) -> Rotation:
    """Rotated dense weights, distributed as trained ones about are: normal, σ = 0.02."""

    def make(i: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(i)
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    return Rotation(make, math.prod(shape) * dtype.itemsize)


def dense_outputs(shape: tuple[int, int] = WEIGHT, dtype: torch.dtype = DTYPE) -> Rotation:
    """Rotated outputs whose pages exist: they have been written to once."""
    return Rotation(lambda _: torch.zeros(shape, dtype=dtype), math.prod(shape) * dtype.itemsize)


def quantized_weights(shape: tuple[int, int] = WEIGHT, dtype: torch.dtype = DTYPE) -> Rotation:
    """Rotated nf4 weights, block size 64, double-quantized."""

    def make(i: int) -> qlk.QuantizedWeight:
        generator = torch.Generator().manual_seed(i)
        weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        return qlk.quantize(weight, format=FORMAT, block_size=BLOCK_SIZE, double_quant=True)

    return Rotation(make, math.prod(shape) // 2)
