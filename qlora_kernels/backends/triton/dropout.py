"""dropout with Triton, for ops.dropout; the matmuls replay it inside their own kernels."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kernels.backends.triton.common import ceil_div, contiguous, register_triton_kernel
from qlora_kernels.backends.triton.launch import Launch

_ROWS, _COLS = 4, 256


@register_triton_kernel("dropout")
def dropout_triton(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """`reference.dropout_reference`: x itself where nothing is dropped."""
    if dropout_p == 0.0 or seed is None:
        return x
    if dropout_p == 1.0:
        return torch.zeros_like(x)
    dropped = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        dropout_launch(x, dropout_p, seed, dropped).run()
    return dropped


def dropout_launch(
    x: torch.Tensor, dropout_p: float, seed: torch.Tensor, out: torch.Tensor
) -> Launch:
    """The one launch of a non-empty x with 0 < p < 1."""
    arguments = {"x_ptr": contiguous(x), "out_ptr": out, "numel": x.numel()}
    arguments |= dropout_arguments(dropout_p, seed)
    arguments |= {"ROWS": _ROWS, "COLS": _COLS}
    return Launch("dropout._dropout_kernel", (ceil_div(x.numel(), _ROWS * _COLS),), arguments)


def dropout_arguments(dropout_p: float, seed: torch.Tensor | None) -> dict[str, Any]:
    """What `dropout_tile` takes for 0 <= p < 1: the seed on the device, kept iff a 32-bit word is
    at least `threshold` (an unsigned number in a signed argument), and 1 / (1 - p)."""
    threshold = int(dropout_p * 2**32)
    return {
        "seed_ptr": seed,
        "threshold": threshold - (1 << 32) if threshold >= 1 << 31 else threshold,
        "keep_scale": 1.0 / (1.0 - dropout_p),
    }
