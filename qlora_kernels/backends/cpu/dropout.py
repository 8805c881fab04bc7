"""dropout on the CPU: csrc/kernels_cpu/dropout.cpp, for ops.dropout and inside qlora_linear."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cpu.common import register_cpu_kernel


@register_cpu_kernel("dropout")
def dropout_cpu(
    isa: int, x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """`reference.dropout_reference` of a contiguous x; x itself where nothing is dropped."""
    if dropout_p == 0.0 or seed is None:
        return x
    dropped = torch.empty_like(x)
    torch.ops.qlora_kernels_cpu.dropout.default(x, dropout_p, seed, dropped, isa)
    return dropped
