"""double_quantize: fp32 absmax to 8-bit codes of the dynamic8 map, one fp32 scale per 256 of them,
and one offset.

Rounding order: offset = float32(mean in fp64 of an exactly rounded sum); c = absmax - offset in
fp32; n = c·(1 / max(max|c|, 2^-126)); code = nearest entry by fp32 midpoints, a tie to the lower
value.
"""

from __future__ import annotations

import math

import torch

from qlora_kernels.formats.packing import n_blocks
from qlora_kernels.reference.quantize import SMALLEST_NORMAL


def double_quantize_reference(
    absmax: torch.Tensor, scale_codebook: torch.Tensor, scale_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize first-level scales.

    Args:
        absmax: fp32 [n_blocks].
        scale_codebook: fp32 [256], ascending.
        scale_block_size: scales per second-level scale.

    Returns:
        scale_codes u8 [n_blocks], scale_absmax fp32 [ceil(n_blocks / scale_block_size)],
        scale_offset fp32 [1]. A NaN anywhere makes offset and every scale_absmax NaN (codes: the
        code of 0), so that all of it decodes to NaN.
    """
    count, device = absmax.numel(), absmax.device
    # fsum refuses to add infinities of both signs; their sum is NaN.
    both = bool(absmax.isposinf().any()) and bool(absmax.isneginf().any())
    total = math.nan if both else math.fsum(absmax.tolist())
    offset = torch.tensor([total / count if count else 0.0], dtype=torch.float32, device=device)
    blocks = n_blocks(count, scale_block_size)
    centred = absmax.new_zeros(blocks * scale_block_size)
    centred[:count] = absmax - offset
    centred = centred.reshape(blocks, scale_block_size)
    scale_absmax = centred.abs().amax(dim=1) if blocks else absmax.new_zeros(0)
    normalised = centred * (1.0 / scale_absmax.clamp(min=SMALLEST_NORMAL))[:, None]
    midpoints = (scale_codebook[:-1] + scale_codebook[1:]) * 0.5
    codes = torch.searchsorted(midpoints, normalised, right=False)
    zero_code = int(scale_codebook.abs().argmin())
    use_zero_code = (scale_absmax == 0) | scale_absmax.isnan()
    codes = torch.where(use_zero_code[:, None], zero_code, codes)
    return codes.reshape(-1)[:count].to(torch.uint8), scale_absmax, offset
