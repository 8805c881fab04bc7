"""quantize on the CPU: csrc/kernels_cpu/quantize*.cpp, called by ops.quantize."""

from __future__ import annotations

import torch

from qlora_kernels.backends.cpu.common import contiguous, register_cpu_kernel
from qlora_kernels.backends.cpu.small_blocks import are_small, quantize_small
from qlora_kernels.formats.packing import n_blocks, packed_size


@register_cpu_kernel("quantize")
def quantize_cpu(
    isa: int,
    weight: torch.Tensor,
    boundaries: torch.Tensor,
    rank_codes: torch.Tensor,
    zero_code: int,
    block_size: int,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes u8 [ceil(numel/2)] and absmax fp32 [n_blocks]; see `reference.quantize_reference`."""
    if are_small(block_size):
        return quantize_small(isa, weight, boundaries, rank_codes, zero_code, scales)
    numel = weight.numel()
    codes = torch.empty(packed_size(numel), dtype=torch.uint8)
    absmax = torch.empty(n_blocks(numel, block_size), dtype=torch.float32)
    torch.ops.qlora_kernels_cpu.quantize.default(
        contiguous(weight.detach()),
        contiguous(boundaries),
        contiguous(rank_codes),
        zero_code,
        block_size,
        None if scales is None else contiguous(scales),
        codes,
        absmax,
        isa,
    )
    return codes, absmax
