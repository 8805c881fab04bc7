"""What the Functions share: x as rows of tokens, and the gradient of a bias."""

from __future__ import annotations

import torch


def bias_gradient(grad_y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over tokens, in at least fp32."""
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    return grad_y.sum(dim=0, dtype=wide).to(dtype)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K]."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def shaped_like(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y [M, N] with the leading dimensions of x [..., K]."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
