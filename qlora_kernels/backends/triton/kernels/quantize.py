"""quantize: one pass over the weight, a tile of whole blocks per program."""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.tiles import lookup_tile, widen_tile


@triton.jit
def _rank_tile(values, magnitudes, boundaries, DECODED: tl.constexpr):
    """Number of boundaries [16] (ascending, +inf beyond the last) strictly below each value.

    DECODED compares with boundary·magnitude, exact in fp64, instead of the boundary.
    """
    rank = tl.zeros(values.shape, tl.int32)
    for log_step in tl.static_range(3, -1, -1):
        step = 1 << log_step
        limit = lookup_tile(boundaries, rank + (step - 1))
        if DECODED:
            limit = limit * magnitudes
        rank += tl.where(values > limit, step, 0)
    return rank


@triton.jit
def _quantize_kernel(
    weight_ptr,
    boundaries_ptr,
    rank_codes_ptr,
    scales_ptr,
    codes_ptr,
    absmax_ptr,
    numel,
    n_bytes,
    n_blocks,
    zero_code,
    N_BOUNDARIES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    DECODED: tl.constexpr,
):
    offs_block = tl.program_id(0).to(tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    offs = offs_block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = offs < numel
    weight = widen_tile(tl.load(weight_ptr + offs, mask=inside, other=0.0))
    mask_block = offs_block < n_blocks

    # Magnitudes order like their bit patterns, with Inf and NaN above every finite one.
    largest = tl.max(weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = largest < 0x7F800000
    absmax = tl.where(finite, largest, 0x7FC00000).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + offs_block, absmax, mask=mask_block)

    offs_rank = tl.arange(0, 16)
    boundaries = tl.load(
        boundaries_ptr + offs_rank, mask=offs_rank < N_BOUNDARIES, other=float("inf")
    )
    rank_codes = tl.load(rank_codes_ptr + offs_rank, mask=offs_rank <= N_BOUNDARIES, other=0)
    if DECODED:
        scales = tl.load(scales_ptr + offs_block, mask=mask_block, other=0.0)
        usable = finite & (scales != 0) & (tl.abs(scales) < float("inf"))
        negative = scales.to(tl.int32, bitcast=True) < 0
        values = tl.where(negative[:, None], -weight, weight).to(tl.float64)
        magnitudes = tl.abs(scales).to(tl.float64)[:, None]
    else:
        usable = finite & (largest != 0)
        # 2^-126 keeps the inverse finite for blocks of zeros and denormals.
        divisor = tl.where(finite, tl.maximum(absmax, 1.1754943508222875e-38), 1.0)
        inverse = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
        values = weight * inverse[:, None]
        magnitudes = 1.0
    rank = _rank_tile(values, magnitudes, boundaries, DECODED)
    codes = lookup_tile(rank_codes.to(tl.int32), rank)
    codes = tl.where(usable[:, None] & inside, codes, zero_code)

    high, low = tl.split(codes.reshape(TILE_BLOCKS, BLOCK_SIZE // 2, 2))
    offs_byte = offs_block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    packed = ((high << 4) | low).to(tl.uint8)
    tl.store(codes_ptr + offs_byte, packed, mask=offs_byte < n_bytes)
