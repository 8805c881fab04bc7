"""What a mutation of a Triton kernel is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class TritonMutation:
    """One wrong kernel.

    Attributes:
        what: the fault, as the test's name.
        file: of qlora_kernels/backends/triton/kernels, without its suffix.
        old, new: the change; `old` must occur exactly `count` times.
        check: a test of the kernels, which must fail with an AssertionError.
        count: how often `old` occurs.
    """

    what: str
    file: str
    old: str
    new: str
    check: Callable[[torch.device], None]
    count: int = 1
