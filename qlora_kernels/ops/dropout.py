"""torch.ops.qlora_kernels.dropout: what a LoRA over a dense weight applies to x and replays."""

from __future__ import annotations

import torch

from qlora_kernels.backends.registry import Problem, select
from qlora_kernels.ops.library import define


def _fake_dropout(x: torch.Tensor, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define("dropout(Tensor x, float dropout_p, Tensor seed) -> Tensor", _fake_dropout)
def _dropout(x: torch.Tensor, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    if dropout_p == 0.0:  # Kernels return x itself then, and an op may not return its input.
        return x.clone(memory_format=torch.contiguous_format)
    problem = Problem("dropout", x.device.type, x.dtype, in_features=x.numel())
    dropped: torch.Tensor = select(problem).fn(x.contiguous(), dropout_p, seed)
    return dropped


def draw_seed(device: torch.device) -> torch.Tensor:
    """An int64 [1] from torch's default generator of `device`: 64 random bits (but for one value
    that randint's open upper end leaves out)."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
