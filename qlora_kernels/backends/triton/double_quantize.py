"""double_quantize with Triton, called by ops.double_quantize."""

from __future__ import annotations

import torch

from qlora_kernels.backends.triton.common import (
    ceil_div,
    contiguous,
    register_triton_kernel,
    triton_rejects,
)
from qlora_kernels.backends.triton.launch import Launch
from qlora_kernels.formats.packing import n_blocks

# Scales of a program: tiles small enough to stay in registers.
_SUM_TILES, _SUM_TILE = 8, 512
_PARTIALS_TILE = 64
_COLUMNS = 16  # kernels/double_quantize.py COLUMNS


@register_triton_kernel("double_quantize", rejects=triton_rejects((torch.float32,)))
def double_quantize_triton(
    absmax: torch.Tensor, scale_codebook: torch.Tensor, scale_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale_codes u8, scale_absmax fp32, scale_offset fp32 [1]; see `reference`."""
    count = absmax.numel()
    scale_codes = absmax.new_empty(count, dtype=torch.uint8)
    scale_absmax = absmax.new_empty(n_blocks(count, scale_block_size))
    if not count:
        return scale_codes, scale_absmax, absmax.new_zeros(1)
    scale_offset = absmax.new_empty(1)
    for launch in double_quantize_launches(
        absmax, scale_codebook, scale_block_size, scale_codes, scale_absmax, scale_offset
    ):
        launch.run()
    return scale_codes, scale_absmax, scale_offset


def double_quantize_launches(
    absmax: torch.Tensor,
    scale_codebook: torch.Tensor,
    scale_block_size: int,
    scale_codes: torch.Tensor,
    scale_absmax: torch.Tensor,
    scale_offset: torch.Tensor,
) -> tuple[Launch, Launch, Launch]:
    """Partial sums, offset, codes."""
    count = absmax.numel()
    absmax = absmax.detach().contiguous()
    parts = ceil_div(count, _SUM_TILES * _SUM_TILE)
    partials = absmax.new_empty(parts, _COLUMNS, dtype=torch.int64)
    return (
        Launch(
            "double_quantize._sum_kernel",
            (parts,),
            {
                "absmax_ptr": absmax,
                "partials_ptr": partials,
                "count": count,
                "TILES": _SUM_TILES,
                "TILE": _SUM_TILE,
            },
        ),
        Launch(
            "double_quantize._offset_kernel",
            (1,),
            {
                "partials_ptr": partials,
                "offset_ptr": scale_offset,
                "parts": parts,
                "count": count,
                "TILE": _PARTIALS_TILE,
            },
        ),
        Launch(
            "double_quantize._encode_scales_kernel",
            (scale_absmax.numel(),),
            {
                "absmax_ptr": absmax,
                "offset_ptr": scale_offset,
                "scale_codebook_ptr": contiguous(scale_codebook),
                "scale_codes_ptr": scale_codes,
                "scale_absmax_ptr": scale_absmax,
                "count": count,
                "SCALE_BLOCK_SIZE": scale_block_size,
            },
            # 256 scales are two a lane.
            num_warps=4 if scale_block_size > 256 else 1,
        ),
    )
