"""dropout: a mask that is a function of (seed, element index), so that backward replays it instead
of storing it.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): key = the
seed's two halves, counter = (index / 4 low, index / 4 high, 0, 0), word index % 4, index row-major
over x [M,K]. Kept iff word >= floor(p·2^32).
"""

from __future__ import annotations

import torch

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a·b for 32-bit a, b held in int64 (split, because the product needs
    64 unsigned bits)."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(seed: int, numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The random 32-bit words of elements 0 … numel - 1, as int64 [numel]; `seed` is any 64-bit
    integer."""
    blocks = -(-numel // 4)
    counter = torch.arange(blocks, dtype=torch.int64, device=device)
    c0, c1 = counter & _MASK, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[:numel]


def dropout_reference(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """x with elements dropped and the kept ones times fl32(1 / (1 - p)), rounded to x's dtype.

    p = 0 (or no seed) returns x, p = 1 zeros. Dropped elements are 0 even where x is NaN. Linear
    in x: applied to a gradient it is its own backward.
    """
    if dropout_p == 0.0 or seed is None:
        return x
    if dropout_p == 1.0:
        return torch.zeros_like(x)
    words = philox_words(int(seed), x.numel(), x.device).reshape(x.shape)
    kept = words >= int(dropout_p * 2**32)
    scale = torch.tensor(1.0 / (1.0 - dropout_p), dtype=torch.float32).item()
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    return torch.where(kept, wide, 0.0).to(x.dtype)
