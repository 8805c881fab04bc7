"""Blocks of 16 weights on the CPU, whose kernels decode and encode 32 under one scale.

Two passes over blocks of 32, one with the scales of the first halves and one with those of the
second halves; each result keeps its own half. The matmuls decode the whole weight so and multiply
by torch's GEMM.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qlora_kernels.backends.cpu.common import LEAST_BLOCK_SIZE, contiguous
from qlora_kernels.formats.packing import n_blocks
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import decode_scales_reference, quantize_reference

SIZE = LEAST_BLOCK_SIZE // 2


def are_small(block_size: int) -> bool:
    """Whether blocks are the halves of what a kernel takes."""
    return block_size < LEAST_BLOCK_SIZE


def _halves(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of first and of second halves; a last block without a second one gets 0."""
    pairs = F.pad(scales, (0, scales.numel() % 2)).view(-1, 2)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def dequantize_small(isa: int, operands: WeightOperands, dtype: torch.dtype) -> torch.Tensor:
    """Dense weight, flat [numel]."""
    numel = 1
    for size in operands.shape:
        numel *= size
    scales = decode_scales_reference(operands)
    codes, codebook = contiguous(operands.codes), contiguous(operands.codebook)
    first, second = (torch.empty(1, numel, dtype=dtype) for _ in range(2))
    for absmax, dense in zip(_halves(scales), (first, second), strict=True):
        torch.ops.qlora_kernels_cpu.dequantize.default(
            codes,
            absmax,
            None,
            None,
            None,
            codebook,
            None,
            1,
            numel,
            LEAST_BLOCK_SIZE,
            operands.scale_block_size,
            dense,
            True,
            isa,
        )
    dense, other = first.view(-1), second.view(-1)
    whole = numel // LEAST_BLOCK_SIZE * LEAST_BLOCK_SIZE
    dense[:whole].view(-1, 2, SIZE)[:, 1] = other[:whole].view(-1, 2, SIZE)[:, 1]
    dense[whole + SIZE :] = other[whole + SIZE :]
    return dense


def quantize_small(
    isa: int,
    weight: torch.Tensor,
    boundaries: torch.Tensor,
    rank_codes: torch.Tensor,
    zero_code: int,
    scales: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax; against given scales by the kernel, else, and for the elements after the
    last 32, by the reference."""
    flat = contiguous(weight.detach()).view(-1)
    whole = flat.numel() // LEAST_BLOCK_SIZE * LEAST_BLOCK_SIZE
    encoder = (boundaries, rank_codes, zero_code)
    # The kernel would give up both halves where one of them is not finite.
    if scales is None or whole == 0 or not bool(flat.isfinite().all()):
        return quantize_reference(flat, *encoder, SIZE, scales)
    blocks = whole // LEAST_BLOCK_SIZE
    first, second = (torch.empty(whole // 2, dtype=torch.uint8) for _ in range(2))
    unused = torch.empty(blocks, dtype=torch.float32)
    halves = _halves(scales[: 2 * blocks])
    for half, codes in zip(halves, (first, second), strict=True):
        torch.ops.qlora_kernels_cpu.quantize.default(
            flat[:whole],
            contiguous(boundaries),
            contiguous(rank_codes),
            zero_code,
            LEAST_BLOCK_SIZE,
            half,
            codes,
            unused,
            isa,
        )
    first.view(-1, 2, SIZE // 2)[:, 1] = second.view(-1, 2, SIZE // 2)[:, 1]
    absmax = torch.empty(n_blocks(flat.numel(), SIZE), dtype=torch.float32)
    absmax[: 2 * blocks] = flat[:whole].view(-1, SIZE).abs().amax(dim=1)
    rest, absmax[2 * blocks :] = quantize_reference(
        flat[whole:], *encoder, SIZE, scales[2 * blocks :]
    )
    return torch.cat([first, rest]), absmax
