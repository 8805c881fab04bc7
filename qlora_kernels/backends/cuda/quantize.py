"""quantize in CUDA: csrc/kernels/quantize.cu, called by ops.quantize."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cuda.common import contiguous, current_stream, register_cuda_kernel
from qlora_kernels.formats.packing import n_blocks, packed_size


@register_cuda_kernel("quantize")
def quantize_cuda(
    weight: torch.Tensor,
    boundaries: torch.Tensor,
    rank_codes: torch.Tensor,
    zero_code: int,
    block_size: int,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes u8 [ceil(numel/2)] and absmax fp32 [n_blocks]; see `reference.quantize_reference`."""
    numel = weight.numel()
    codes = weight.new_empty(packed_size(numel), dtype=torch.uint8)
    absmax = weight.new_empty(n_blocks(numel, block_size), dtype=torch.float32)
    torch.ops.qlora_kernels_cuda.quantize.default(
        contiguous(weight.detach()),
        contiguous(boundaries),
        contiguous(rank_codes),
        zero_code,
        block_size,
        None if scales is None else contiguous(scales),
        codes,
        absmax,
        current_stream(weight),
    )
    return codes, absmax
