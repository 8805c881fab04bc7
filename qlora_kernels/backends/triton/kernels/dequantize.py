"""dequantize: codes and scales, single or double, to a dense weight in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.tiles import (
    decode_pairs_tile,
    decode_scales_tile,
    lookup_tile,
    round_tile,
    scale_tables,
)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    absmax_ptr,
    scale_codes_ptr,
    scale_absmax_ptr,
    scale_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    out_ptr,
    cols,
    cols_bytes,
    out_pitch,
    tiles_per_row,
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Rows that begin at a block: a program decodes TILE_BLOCKS whole blocks of one row.

    cols_bytes is ceil(cols / 2). A contiguous weight of any size is one row.
    """
    row = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    first = (tl.program_id(0) % tiles_per_row).to(tl.int64) * TILE_BLOCKS
    offs_block = first + tl.arange(0, TILE_BLOCKS)
    mask_block = offs_block * BLOCK_SIZE < cols
    scale_offset, scale_codebook = scale_tables(scale_offset_ptr, scale_codebook_ptr, DOUBLE_QUANT)
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))

    HALF: tl.constexpr = BLOCK_SIZE // 2
    offs_byte = offs_block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(codes_ptr + row * cols_bytes + offs_byte, mask=offs_byte < cols_bytes, other=0)
    scales = decode_scales_tile(
        row * (cols // BLOCK_SIZE) + offs_block,
        mask_block,
        absmax_ptr,
        scale_codes_ptr,
        scale_absmax_ptr,
        scale_offset,
        scale_codebook,
        SCALE_BLOCK_SIZE,
        DOUBLE_QUANT,
    )
    dense = decode_pairs_tile(packed, codebook) * scales[:, None]
    offs = offs_block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(
        out_ptr + row * out_pitch + offs,
        round_tile(dense, out_ptr.dtype.element_ty),
        mask=offs < cols,
    )


@triton.jit
def _dequantize_ragged_kernel(
    codes_ptr,
    absmax_ptr,
    scale_codes_ptr,
    scale_absmax_ptr,
    scale_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    out_ptr,
    cols,
    out_pitch,
    tiles_per_row,
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows that begin anywhere, in the middle of a byte or of a block: element by element."""
    row = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    offs = (tl.program_id(0) % tiles_per_row).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offs < cols
    scale_offset, scale_codebook = scale_tables(scale_offset_ptr, scale_codebook_ptr, DOUBLE_QUANT)
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))

    element = row * cols + offs
    packed = tl.load(codes_ptr + element // 2, mask=mask, other=0).to(tl.int32)
    codes = tl.where(element % 2 == 0, packed >> 4, packed & 15)
    scales = decode_scales_tile(
        element // BLOCK_SIZE,
        mask,
        absmax_ptr,
        scale_codes_ptr,
        scale_absmax_ptr,
        scale_offset,
        scale_codebook,
        SCALE_BLOCK_SIZE,
        DOUBLE_QUANT,
    )
    dense = round_tile(lookup_tile(codebook, codes) * scales, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_pitch + offs, dense, mask=mask)
