"""dequantize and dequantize_many: codes and scales, single or double, to dense weights in one
launch."""

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
def dequantize_tile(
    row,
    first,
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
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Decodes and stores blocks first … first + TILE_BLOCKS - 1 (int64) of a row that begins at a
    block."""
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
    dequantize_tile(
        row,
        first,
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
        BLOCK_SIZE,
        SCALE_BLOCK_SIZE,
        DOUBLE_QUANT,
        TILE_BLOCKS,
    )


@triton.jit
def _dequantize_many_kernel(
    codes_ptrs,
    absmax_ptrs,
    scale_codes_ptrs,
    scale_absmax_ptrs,
    scale_offset_ptrs,
    codebook_ptrs,
    scale_codebook_ptrs,
    out_ptrs,
    first_programs,
    cols,
    out_pitches,
    tiles_per_row,
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """COUNT weights, whose programs follow one another; every argument is a tuple of COUNT.

    Selects, not branches: hints of alignment are lost on the result of a branch. ALIGNED: pointers
    are at 16-byte boundaries, and pitches and columns multiples of 32.
    """
    program = tl.program_id(0)
    first_program = tl.cast(first_programs[0], tl.int32)
    per_row = tl.cast(tiles_per_row[0], tl.int32)
    row_cols = tl.cast(cols[0], tl.int64)
    out_pitch = tl.cast(out_pitches[0], tl.int64)
    codes_ptr, codebook_ptr, out_ptr = codes_ptrs[0], codebook_ptrs[0], out_ptrs[0]
    if DOUBLE_QUANT:
        scale_codes_ptr, scale_absmax_ptr = scale_codes_ptrs[0], scale_absmax_ptrs[0]
        scale_offset_ptr, scale_codebook_ptr = scale_offset_ptrs[0], scale_codebook_ptrs[0]
        absmax_ptr = None
    else:
        scale_codes_ptr, scale_absmax_ptr = None, None
        scale_offset_ptr, scale_codebook_ptr = None, None
        absmax_ptr = absmax_ptrs[0]
    for i in tl.static_range(1, COUNT):
        here = program >= first_programs[i]
        first_program = tl.where(here, tl.cast(first_programs[i], tl.int32), first_program)
        per_row = tl.where(here, tl.cast(tiles_per_row[i], tl.int32), per_row)
        row_cols = tl.where(here, tl.cast(cols[i], tl.int64), row_cols)
        out_pitch = tl.where(here, tl.cast(out_pitches[i], tl.int64), out_pitch)
        codes_ptr = tl.where(here, codes_ptrs[i], codes_ptr)
        codebook_ptr = tl.where(here, codebook_ptrs[i], codebook_ptr)
        out_ptr = tl.where(here, out_ptrs[i], out_ptr)
        if DOUBLE_QUANT:
            scale_codes_ptr = tl.where(here, scale_codes_ptrs[i], scale_codes_ptr)
            scale_absmax_ptr = tl.where(here, scale_absmax_ptrs[i], scale_absmax_ptr)
            scale_offset_ptr = tl.where(here, scale_offset_ptrs[i], scale_offset_ptr)
            scale_codebook_ptr = tl.where(here, scale_codebook_ptrs[i], scale_codebook_ptr)
        else:
            absmax_ptr = tl.where(here, absmax_ptrs[i], absmax_ptr)
    row_bytes = (row_cols + 1) // 2
    if ALIGNED:
        row_cols = tl.multiple_of(row_cols, 32)
        row_bytes = tl.multiple_of(row_bytes, 16)
        out_pitch = tl.multiple_of(out_pitch, 32)
        codes_ptr = tl.multiple_of(codes_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
    tile = program - first_program
    dequantize_tile(
        (tile // per_row).to(tl.int64),
        (tile % per_row).to(tl.int64) * TILE_BLOCKS,
        codes_ptr,
        absmax_ptr,
        scale_codes_ptr,
        scale_absmax_ptr,
        scale_offset_ptr,
        codebook_ptr,
        scale_codebook_ptr,
        out_ptr,
        row_cols,
        row_bytes,
        out_pitch,
        BLOCK_SIZE,
        SCALE_BLOCK_SIZE,
        DOUBLE_QUANT,
        TILE_BLOCKS,
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
