"""bitsandbytes' 8-bit blockwise codec: a 256-entry table, one fp32 absmax a block, no offset.

It carries optimizer states and the scales of double quantization. Rounding order: n = float32(v)·
(1 / max(absmax, 2^-126)); code = nearest entry by fp32 midpoints, a tie to the lower value; decoded
as float32(table[code])·absmax, rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qlora_kernels.formats.packing import n_blocks
from qlora_kernels.reference.quantize import SMALLEST_NORMAL


def quantize_blockwise_reference(
    values: torch.Tensor, codebook: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes u8 in values' shape and absmax fp32 [n_blocks].

    Args:
        values: fp32, fp16 or bf16 of any shape.
        codebook: fp32 [256], ascending.
        block_size: values per absmax, any positive number; the last block may be short.

    A block without a magnitude gets the code nearest to 0; so does one that holds NaN or Inf, whose
    absmax then makes NaN of all of it.
    """
    flat = values.reshape(-1).to(torch.float32)
    count = flat.numel()
    blocks = n_blocks(count, block_size)
    padded = F.pad(flat, (0, blocks * block_size - count)).view(blocks, block_size)
    absmax = padded.abs().amax(dim=1) if blocks else flat.new_zeros(0)
    normalised = padded * (1.0 / absmax.clamp(min=SMALLEST_NORMAL))[:, None]
    midpoints = (codebook[:-1] + codebook[1:]) * 0.5
    codes = torch.bucketize(normalised, midpoints, out_int32=True).to(torch.uint8)
    codes[(absmax == 0) | ~absmax.isfinite()] = codebook.abs().argmin().to(torch.uint8)
    return codes.view(-1)[:count].view(values.shape), absmax


def dequantize_blockwise_reference(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values in codes' shape; see `quantize_blockwise_reference`."""
    flat = codes.reshape(-1)
    count = flat.numel()
    blocks = n_blocks(count, block_size)
    decoded = codebook.to(torch.float32)[flat.to(torch.int32)]
    padded = F.pad(decoded, (0, blocks * block_size - count)).view(blocks, block_size)
    padded *= absmax.to(torch.float32)[:, None]
    return padded.view(-1)[:count].view(codes.shape).to(dtype)
