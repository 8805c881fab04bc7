"""quantize: a weight to packed 4-bit codes and one fp32 absmax per block.

Rounding order: a = max|float32(w)|; r = 1 / max(a, 2^-126), one fp32 division; n = float32(w)·r,
one fp32 product; code = rank_codes[number of fp32 boundaries strictly below n].
"""

from __future__ import annotations

import torch

from qlora_kernels.formats.packing import n_blocks, pack

SMALLEST_NORMAL = 2.0**-126  # keeps r finite for blocks of zeros and denormals


def quantize_reference(
    weight: torch.Tensor,
    boundaries: torch.Tensor,
    rank_codes: torch.Tensor,
    zero_code: int,
    block_size: int,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight of any shape over its row-major flattening.

    Args:
        weight: fp32, fp16 or bf16.
        boundaries: ascending [L - 1]; fp32, or fp64 exact midpoints together with `scales`.
        rank_codes: u8 [L].
        zero_code: written for all-zero blocks, blocks with NaN/Inf and the pad of an odd length.
        scales: fp32 [n_blocks] decoded scales to encode against: the code whose value times the
            scale is nearest to w (compared in fp64, where midpoint·scale is exact); a zero or NaN
            scale gives zero_code.

    Returns:
        codes u8 [ceil(numel/2)], absmax fp32 [n_blocks]: the exact one in either mode, NaN where a
        block holds NaN/Inf.
    """
    flat = weight.detach().reshape(-1).to(torch.float32)
    numel, device = flat.numel(), flat.device
    blocks = n_blocks(numel, block_size)
    padded = flat.new_zeros(blocks * block_size)
    padded[:numel] = flat
    padded = padded.reshape(blocks, block_size)

    finite = padded.isfinite().all(dim=1)
    absmax = padded.abs().amax(dim=1) if blocks else flat.new_zeros(0)
    absmax = torch.where(finite, absmax, torch.nan)
    if scales is None:
        inverse = 1.0 / absmax.clamp(min=SMALLEST_NORMAL)
        normalised = padded * inverse[:, None]
        use_zero_code = ~finite | (absmax == 0)
        rank = torch.searchsorted(boundaries, normalised.contiguous(), right=False)
    else:
        sign = torch.copysign(torch.ones_like(scales), scales).double()
        limits = boundaries.double()[None, :] * scales.abs().double()[:, None]  # [n_blocks, L - 1]
        signed = padded.double() * sign[:, None]
        use_zero_code = ~finite | (scales == 0) | ~scales.isfinite()
        rank = (signed[:, :, None] > limits[:, None, :]).sum(dim=2)
    codes = rank_codes[rank]
    codes = torch.where(use_zero_code[:, None], torch.full_like(codes, zero_code), codes)
    codes = codes.to(device=device, dtype=torch.uint8)
    return pack(codes.reshape(-1)[:numel], zero_code), absmax
