"""Decoding with byte permutations: eight 4-bit codes to four pairs of 16-bit values, in registers.

PRMT picks four bytes of eight by four selectors, which 4-bit codes are as they are stored. A table
of 16 values of 16 bits is four words of low bytes and four of high bytes: bits 0 to 2 of a code
pick from both halves of a table, bit 3 between the halves. That is elementwise, so Triton decodes
in the layout that its matrix product wants, which a lookup in shared memory does not let it do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.tiles import (
    INTERPRET,
    codes_of_words,
    lookup_tile,
    round_tile,
    widen_tile,
)

# $0 ... $3: pairs of the first to the fourth byte of $4, its high nibble in the low half, as the
# first element. $5 ... $12: low and high bytes of values 0-3, 4-7, 8-11, 12-15. Bit 3 of a selector
# means something else to PRMT, hence the mask; it becomes bit 2 of the last selector, whose other
# bits are the place.
DECODE_PTX = tl.constexpr("""
.reg .b32 codes, half, low, high, from, other;
and.b32 codes, $4, 0x77777777;
shr.u32 half, $4, 1;
lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;
prmt.b32 from, $5, $7, codes;
prmt.b32 other, $9, $11, codes;
prmt.b32 low, from, other, half;
prmt.b32 from, $6, $8, codes;
prmt.b32 other, $10, $12, codes;
prmt.b32 high, from, other, half;
prmt.b32 $0, low, high, 0x4051;
prmt.b32 $1, low, high, 0x6273;
shr.u32 codes, codes, 16;
shr.u32 half, half, 16;
prmt.b32 from, $5, $7, codes;
prmt.b32 other, $9, $11, codes;
prmt.b32 low, from, other, half;
prmt.b32 from, $6, $8, codes;
prmt.b32 other, $10, $12, codes;
prmt.b32 high, from, other, half;
prmt.b32 $2, low, high, 0x4051;
prmt.b32 $3, low, high, 0x6273;
""")
# Times $13 + $14, the pair of a scale's upper and lower half: exact but for the last rounding and
# that of the smaller product. -0 is what bf16 products add on sm_80, which has no other.
SCALE_PTX = tl.constexpr("""
.reg .b32 small, minus_zero;
mov.b32 minus_zero, 0x80008000;
fma.rn.bf16x2 small, $0, $14, minus_zero;
fma.rn.bf16x2 $0, $0, $13, small;
fma.rn.bf16x2 small, $1, $14, minus_zero;
fma.rn.bf16x2 $1, $1, $13, small;
fma.rn.bf16x2 small, $2, $14, minus_zero;
fma.rn.bf16x2 $2, $2, $13, small;
fma.rn.bf16x2 small, $3, $14, minus_zero;
fma.rn.bf16x2 $3, $3, $13, small;
""")


@triton.jit
def table_range(codebook_ptr, ONES: tl.constexpr):
    """Powers of two, fp32 of shape ONES: what to multiply a table by, so that fp16 holds its values
    (the largest magnitude comes to [1, 2)), and its inverse for the scales."""
    first_ptr = codebook_ptr + tl.zeros(ONES, tl.int32)
    largest = tl.zeros(ONES, tl.int32)
    for code in tl.static_range(16):
        magnitude = tl.load(first_ptr + code).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        # Behind a table's last value there may be anything.
        largest = tl.maximum(largest, tl.where(magnitude < 0x7F800000, magnitude, 0))
    # Neither factor is a denormal, and a table of zeros stays what it is.
    exponent = tl.minimum(tl.maximum(largest >> 23, 1), 253)
    exponent = tl.where(largest == 0, 127, exponent)
    up = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return up, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def byte_tables(codebook_ptr, factor, DTYPE: tl.constexpr, ONES: tl.constexpr):
    """A table of 16 values, rounded to DTYPE (bf16, or fp16 after a multiplication by factor), as
    eight words of shape ONES: (1, 1, …): low and high bytes of each four.

    Tensors and not numbers: Triton moves a change of layout over what begins at loads and
    broadcasts, but not over what begins at a number.
    """
    first_ptr = codebook_ptr + tl.zeros(ONES, tl.int32)
    tables = ()
    for word in tl.static_range(4):
        low = tl.zeros(ONES, tl.int32)
        high = tl.zeros(ONES, tl.int32)
        for byte in tl.static_range(4):
            value = tl.load(first_ptr + (4 * word + byte))
            if tl.float16 == DTYPE:
                bits = (value * factor).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
            else:
                # To nearest even, of numbers: a value that is none stands behind a table's last.
                bits = value.to(tl.int32, bitcast=True)
                bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
            low = low | ((bits & 0xFF) << (8 * byte))
            high = high | ((bits >> 8) << (8 * byte))
        tables += (low, high)  # type: ignore[assignment]
    return tables


@triton.jit
def decode_words_prmt(words, tables, DTYPE: tl.constexpr):
    """int32 words [A, B, W] of four bytes to values [A, B, W, 2, 2, 2] of DTYPE, in order."""
    if INTERPRET:
        return _interpreted_values(words, tables, DTYPE)
    else:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            "{" + DECODE_PTX + "}",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            (words,) + tables,  # noqa: RUF005 (Triton does not unpack)
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return unpack_pairs(p0, p1, p2, p3, DTYPE)


@triton.jit
def decode_scaled_words_prmt(words, scales, tables):
    """The same in bf16, times fp32 scales of words' shape: a table value rounded, and its product
    with a scale of at least 16 bits."""
    bits = scales.to(tl.int32, bitcast=True)
    # Cut off and not rounded: the largest scales stay finite.
    high = bits & -0x10000
    rest = round_tile(scales - high.to(tl.float32, bitcast=True), tl.bfloat16)
    if INTERPRET:
        values = widen_tile(decode_words_prmt(words, tables, tl.bfloat16))
        rest = widen_tile(rest)[:, :, :, None, None, None]
        small = widen_tile(round_tile(values * rest, tl.bfloat16))
        high = high.to(tl.float32, bitcast=True)[:, :, :, None, None, None]
        return round_tile(values * high + small, tl.bfloat16)
    else:
        low = rest.to(tl.uint16, bitcast=True).to(tl.int32)
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            "{" + DECODE_PTX + SCALE_PTX + "}",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r",
            (words,) + tables + (high | ((bits >> 16) & 0xFFFF), low | (low << 16)),  # noqa: RUF005
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return unpack_pairs(p0, p1, p2, p3, tl.bfloat16)


@triton.jit
def _interpreted_values(words, tables, DTYPE: tl.constexpr):
    """The same for the interpreter, which has no inline PTX: lookups in what the words hold."""
    code = tl.arange(0, 16)
    low = tl.zeros((16,), tl.int32)
    high = tl.zeros((16,), tl.int32)
    for word in tl.static_range(4):
        here = (code >> 2) == word
        low = tl.where(here, tl.reshape(tables[2 * word], (1,)), low)
        high = tl.where(here, tl.reshape(tables[2 * word + 1], (1,)), high)
    shift = (code & 3) * 8
    table = ((low >> shift) & 0xFF) | (((high >> shift) & 0xFF) << 8)
    values = lookup_tile(table, codes_of_words(words))
    return values.to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def unpack_pairs(p0, p1, p2, p3, DTYPE: tl.constexpr):
    """Four pairs [...] of 16-bit values in int32 to [..., 2, 2, 2], the low half first."""
    # The last axis of a join picks within a pair, the one before it the pair.
    pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))
    even = pairs.to(tl.uint16).to(DTYPE, bitcast=True)
    odd = (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.join(even, odd)
