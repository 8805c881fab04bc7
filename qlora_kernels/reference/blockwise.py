"""quantize_blockwise and dequantize_blockwise: 8-bit codes of a table of 256, a scale per block.

What bitsandbytes' ops of these names are documented to compute (its default backend): n = x·(1 /
max(absmax, 2^-126)) in fp32, code = nearest entry by fp32 midpoints, a tie to the lower value.
"""

from __future__ import annotations

import torch

from qlora_kernels.formats.packing import n_blocks
from qlora_kernels.reference.quantize import SMALLEST_NORMAL


def quantize_blockwise_reference(
    values: torch.Tensor, codebook: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """codes u8 of values' shape, absmax fp32 [n_blocks].

    Args:
        values: fp32, fp16 or bf16.
        codebook: fp32 [256], ascending.
        block_size: elements a scale, any; the last block may be short.

    A block of zeros gets the code of the entry nearest to 0; one with a NaN or an infinity too, and
    absmax NaN, so that all of it decodes to NaN.
    """
    count = values.numel()
    blocks = n_blocks(count, block_size)
    padded = values.new_zeros(blocks * block_size, dtype=torch.float32)
    padded[:count] = values.reshape(-1)
    padded = padded.view(blocks, block_size)
    absmax = padded.abs().amax(dim=1) if blocks else padded.new_zeros(0)
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    normalised = padded * (1.0 / absmax.clamp(min=SMALLEST_NORMAL))[:, None]
    midpoints = (codebook[:-1] + codebook[1:]) * 0.5
    codes = torch.searchsorted(midpoints, normalised, right=False)
    unusable = (absmax == 0) | absmax.isnan()
    codes = torch.where(unusable[:, None], int(codebook.abs().argmin()), codes)
    return codes.view(-1)[:count].to(torch.uint8).view(values.shape), absmax


def dequantize_blockwise_reference(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """codebook[codes]·absmax in fp32, rounded to dtype; of codes' shape."""
    scales = absmax.repeat_interleave(block_size)[: codes.numel()]
    return (codebook[codes.reshape(-1).long()] * scales).to(dtype).view(codes.shape)
