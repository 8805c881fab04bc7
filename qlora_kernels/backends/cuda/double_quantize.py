"""double_quantize in CUDA: csrc/kernels/double_quantize.cu, for ops.double_quantize."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cuda.common import (
    contiguous,
    cuda_rejects,
    current_stream,
    register_cuda_kernel,
)
from qlora_kernels.formats.packing import n_blocks


@register_cuda_kernel("double_quantize", rejects=cuda_rejects((torch.float32,)))
def double_quantize_cuda(
    absmax: torch.Tensor, scale_codebook: torch.Tensor, scale_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale_codes u8, scale_absmax fp32, scale_offset fp32 [1]; see `reference`."""
    count = absmax.numel()
    scale_codes = absmax.new_empty(count, dtype=torch.uint8)
    scale_absmax = absmax.new_empty(n_blocks(count, scale_block_size))
    if not count:
        return scale_codes, scale_absmax, absmax.new_zeros(1)
    scale_offset = absmax.new_empty(1)
    scratch = torch.ops.qlora_kernels_cuda.double_quantize_scratch.default()
    torch.ops.qlora_kernels_cuda.double_quantize.default(
        contiguous(absmax.detach()),
        contiguous(scale_codebook),
        scale_block_size,
        scale_codes,
        scale_absmax,
        scale_offset,
        absmax.new_empty(scratch, dtype=torch.int64),
        current_stream(absmax),
    )
    return scale_codes, scale_absmax, scale_offset
