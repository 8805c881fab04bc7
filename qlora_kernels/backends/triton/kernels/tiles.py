"""Tile functions that every kernel shares: decoding codes and scales, rounding, products, dropout.

Where rounding matters, a kernel relies on `enable_fp_fusion=False`, which `launch.py` always sets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels import env

# The interpreter runs on numpy, which has no bf16: arithmetic on it is wrong there, and so is the
# rounding of fp32 to it. Tile functions that would meet either go through fp32 and integers then.
INTERPRET = tl.constexpr(env.triton_interpret())


@triton.jit
def round_tile(tile, DTYPE: tl.constexpr):
    """fp32 to DTYPE, to nearest even."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = tile.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x00400000, rounded)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return tile.to(DTYPE)


@triton.jit
def widen_tile(tile):
    """fp32, fp16 or bf16 to fp32. The interpreter loses bf16's denormals."""
    if INTERPRET and tile.dtype == tl.bfloat16:
        return (tile.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return tile.to(tl.float32)


@triton.jit
def dot_tile(left, right, acc):
    """acc + left·right in fp32; exact products, never tf32."""
    if INTERPRET:
        left, right = widen_tile(left), widen_tile(right)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def lookup_tile(table, index):
    """table[index] for a table [2^n] in registers and an int32 index of any shape."""
    return tl.gather(table, index.reshape(index.numel), 0).reshape(index.shape)


@triton.jit
def decode_pairs_tile(packed, codebook):
    """Bytes [..., P] to fp32 values [..., 2P]: the high nibble is the even element."""
    packed = packed.to(tl.int32)
    return tl.interleave(lookup_tile(codebook, packed >> 4), lookup_tile(codebook, packed & 15))


@triton.jit
def codes_of_words(words):
    """int32 words [..., W] of four bytes to codes [..., W, 2, 2, 2] in the elements' order.

    From a word, shift and mask give a table's offset at once; a byte has to be extracted first.
    """
    # Little-endian: the first byte is the lowest, its high nibble the first element. The last axis
    # of a join picks within a pair, the one before it the pair.
    even = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))
    odd = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    return tl.join(even, odd) & 15


@triton.jit
def decode_words_tile(words, codebook):
    """int32 words [ROWS, W] of four bytes to fp32 values [ROWS, 8W]. One lookup for all: each puts
    the table into shared memory and waits for it."""
    ROWS: tl.constexpr = words.shape[0]
    COLS: tl.constexpr = 8 * words.shape[1]
    return lookup_tile(codebook, codes_of_words(words)).reshape(ROWS, COLS)


@triton.jit
def decode_scales_tile(
    index,
    mask,
    absmax_ptr,
    scale_codes_ptr,
    scale_absmax_ptr,
    scale_offset,
    scale_codebook,
    SCALE_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """First-level scales number `index` (int64), fp32: two roundings if they are double-quantized.

    scale_offset and scale_codebook [256] are values in registers (anything if not DOUBLE_QUANT).
    """
    if DOUBLE_QUANT:
        codes = tl.load(scale_codes_ptr + index, mask=mask, other=0).to(tl.int32)
        per_scale = tl.load(scale_absmax_ptr + index // SCALE_BLOCK_SIZE, mask=mask, other=0.0)
        return lookup_tile(scale_codebook, codes) * per_scale + scale_offset
    else:
        return tl.load(absmax_ptr + index, mask=mask, other=0.0)


@triton.jit
def scale_tables(scale_offset_ptr, scale_codebook_ptr, DOUBLE_QUANT: tl.constexpr):
    """What `decode_scales_tile` wants loaded once: the offset and the 256-entry map."""
    if DOUBLE_QUANT:
        return tl.load(scale_offset_ptr), tl.load(scale_codebook_ptr + tl.arange(0, 256))
    else:
        return 0.0, 0.0


@triton.jit
def scale_rows_tile(values, scales, GROUPS: tl.constexpr):
    """values [ROWS, COLS] times scales [ROWS, GROUPS], each for COLS / GROUPS neighbours."""
    ROWS: tl.constexpr = values.shape[0]
    COLS: tl.constexpr = values.shape[1]
    if GROUPS == 1:
        return values * scales.reshape(ROWS, 1)
    else:
        grouped = values.reshape(ROWS, GROUPS, COLS // GROUPS)
        return (grouped * scales[:, :, None]).reshape(ROWS, COLS)
