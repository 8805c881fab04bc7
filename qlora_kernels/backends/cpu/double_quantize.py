"""double_quantize on the CPU: csrc/kernels_cpu/double_quantize*.cpp, for ops.double_quantize."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cpu.common import contiguous, cpu_rejects, register_cpu_kernel
from qlora_kernels.formats.packing import n_blocks


@register_cpu_kernel("double_quantize", rejects=cpu_rejects((torch.float32,)))
def double_quantize_cpu(
    isa: int, absmax: torch.Tensor, scale_codebook: torch.Tensor, scale_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale_codes u8, scale_absmax fp32, scale_offset fp32 [1]; see `reference`."""
    count = absmax.numel()
    scale_codes = torch.empty(count, dtype=torch.uint8)
    scale_absmax = torch.empty(n_blocks(count, scale_block_size), dtype=torch.float32)
    scale_offset = torch.empty(1, dtype=torch.float32)
    torch.ops.qlora_kernels_cpu.double_quantize.default(
        contiguous(absmax.detach()),
        contiguous(scale_codebook),
        scale_block_size,
        scale_codes,
        scale_absmax,
        scale_offset,
        isa,
    )
    return scale_codes, scale_absmax, scale_offset
