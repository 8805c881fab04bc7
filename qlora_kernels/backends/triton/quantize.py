"""quantize with Triton, called by ops.quantize."""

from __future__ import annotations

import torch

from qlora_kernels.backends.triton.common import ceil_div, contiguous, register_triton_kernel
from qlora_kernels.backends.triton.launch import Launch
from qlora_kernels.formats.packing import n_blocks, packed_size

# Elements of a program: 32 a thread, so that the loads of 2-byte weights are four times 16 bytes.
_TILE = 4096


@register_triton_kernel("quantize")
def quantize_triton(
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
    if numel:
        quantize_launch(
            weight, boundaries, rank_codes, zero_code, block_size, scales, codes, absmax
        ).run()
    return codes, absmax


def quantize_launch(
    weight: torch.Tensor,
    boundaries: torch.Tensor,
    rank_codes: torch.Tensor,
    zero_code: int,
    block_size: int,
    scales: torch.Tensor | None,
    codes: torch.Tensor,
    absmax: torch.Tensor,
) -> Launch:
    """The one launch of a non-empty weight."""
    tile_blocks = max(1, _TILE // block_size)
    return Launch(
        "quantize._quantize_kernel",
        (ceil_div(absmax.numel(), tile_blocks),),
        {
            "weight_ptr": contiguous(weight.detach()),
            "boundaries_ptr": contiguous(boundaries),
            "rank_codes_ptr": contiguous(rank_codes),
            "scales_ptr": contiguous(scales),
            "codes_ptr": codes,
            "absmax_ptr": absmax,
            "numel": weight.numel(),
            "n_bytes": codes.numel(),
            "n_blocks": absmax.numel(),
            "zero_code": zero_code,
            "N_BOUNDARIES": boundaries.numel(),
            "BLOCK_SIZE": block_size,
            "TILE_BLOCKS": tile_blocks,
            "DECODED": scales is not None,
        },
    )
