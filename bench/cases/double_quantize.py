"""double_quantize: the 262,144 scales of a 4096x4096 weight at block size 64."""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import torch

import qlora_kernels as qlk
from bench.records import Row, Settings
from bench.shapes import BLOCK_SIZE, WEIGHT
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.timing import Rotation, time_interleaved

COUNT = math.prod(WEIGHT) // BLOCK_SIZE


def case_double_quantize(settings: Settings) -> list[Row]:
    """Against what bitsandbytes does with its absmax: mean, difference, blockwise quantization."""

    def make(i: int) -> torch.Tensor:
        return torch.rand(COUNT, generator=torch.Generator().manual_seed(i)) * 0.01 + 0.05

    scales = Rotation(make, COUNT * 4)
    with qlk.backend("reference"):
        expected = qlk.double_quantize(scales[0])
    for mine, theirs in zip(qlk.double_quantize(scales[0]), expected, strict=True):
        assert_bitwise_equal(mine, theirs)

    def peer(i: int) -> object:
        absmax = scales[i]
        return bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)

    times = time_interleaved(
        {"ours": lambda i: qlk.double_quantize(scales[i]), "peer": peer},
        rounds=settings.rounds,
        seconds=settings.seconds,
    )
    return [
        Row(
            "double_quantize 262144 scales",
            "bitsandbytes quantize_blockwise",
            times["ours"],
            times["peer"],
        )
    ]
