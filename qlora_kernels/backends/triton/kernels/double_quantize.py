"""double_quantize: an exact sum of all scales, their mean, then one second-level block a program.

The sum is exact and so the same in any order: each fp32 is an integer multiple of 2^-149, cut into
32-bit digits that are added as 64-bit integers. One rounding to fp64 at the end gives what
`math.fsum` gives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.tiles import lookup_tile

# fp32 magnitudes below 2^128 are below 2^277 units of 2^-149: nine 32-bit digits.
DIGITS = tl.constexpr(9)
# Columns of a partial sum: the digits, then how many NaN, +Inf and -Inf there were.
COLUMNS = tl.constexpr(16)


@triton.jit
def _digit_sums(bits):
    """Sums int64 [16] of a tile of fp32 bit patterns."""
    exponent = (bits >> 23) & 0xFF
    fraction = bits & 0x7FFFFF
    special = exponent == 0xFF
    # A denormal has the smallest normal's unit and no implicit bit.
    mantissa = tl.where(exponent > 0, fraction | 0x800000, fraction).to(tl.int64)
    position = tl.maximum(exponent - 1, 0)
    wide = tl.where(special, 0, mantissa << (position & 31).to(tl.int64))
    low = wide & 0xFFFFFFFF
    high = wide >> 32
    negative = bits < 0
    low = tl.where(negative, -low, low)
    high = tl.where(negative, -high, high)
    digit = position >> 5

    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.int64)
    for i in tl.static_range(DIGITS):
        part = tl.where(digit == i, low, 0) + tl.where(digit + 1 == i, high, 0)
        sums = tl.where(column == i, tl.sum(part, axis=0), sums)
    nan = special & (fraction != 0)
    infinite = special & (fraction == 0)
    up = tl.sum((infinite & (bits > 0)).to(tl.int64), axis=0)
    down = tl.sum((infinite & (bits < 0)).to(tl.int64), axis=0)
    sums = tl.where(column == DIGITS, tl.sum(nan.to(tl.int64), axis=0), sums)
    sums = tl.where(column == DIGITS + 1, up, sums)
    return tl.where(column == DIGITS + 2, down, sums)


@triton.jit
def _sum_kernel(absmax_ptr, partials_ptr, count, TILES: tl.constexpr, TILE: tl.constexpr):
    """Partial sums int64 [programs, 16] of TILES·TILE scales each."""
    first = tl.program_id(0).to(tl.int64) * (TILES * TILE)
    sums = tl.zeros((COLUMNS,), tl.int64)
    for i in range(TILES):
        offs = first + i * TILE + tl.arange(0, TILE)
        values = tl.load(absmax_ptr + offs, mask=offs < count, other=0.0)
        sums += _digit_sums(values.to(tl.int32, bitcast=True))
    column = tl.arange(0, COLUMNS)
    tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * COLUMNS + column, sums)


@triton.jit(do_not_specialize=["count"])
def _offset_kernel(partials_ptr, offset_ptr, parts, count, TILE: tl.constexpr):
    """offset = fl32(fl64(fl64(sum) / count)) from the partial sums; one program."""
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.int64)
    for first in range(0, parts, TILE):
        row = first + tl.arange(0, TILE)
        offs = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        sums += tl.sum(tl.load(partials_ptr + offs, mask=row[:, None] < parts, other=0), axis=0)

    # The carry out of the last digit tells the sign: -1 if the sum is negative.
    carry = tl.zeros((), tl.int64)
    for i in tl.static_range(DIGITS + 2):
        carry = (tl.sum(tl.where(column == i, sums, 0) * (column < DIGITS), axis=0) + carry) >> 32
    sign = tl.where(carry < 0, -1, 1).to(tl.int64)

    # The highest digit that is not 0, the two below it, and whether anything is left below those.
    carry = tl.zeros((), tl.int64)
    below1 = tl.zeros((), tl.int64)
    below2 = tl.zeros((), tl.int64)
    rest = tl.zeros((), tl.int64)
    top0 = tl.zeros((), tl.int64)
    top1 = tl.zeros((), tl.int64)
    top2 = tl.zeros((), tl.int64)
    sticky = tl.zeros((), tl.int64)
    place = tl.zeros((), tl.int64)
    for i in tl.static_range(DIGITS + 2):
        value = tl.sum(tl.where(column == i, sums, 0) * (column < DIGITS), axis=0) * sign + carry
        digit = value & 0xFFFFFFFF
        carry = value >> 32
        nonzero = digit != 0
        top0 = tl.where(nonzero, digit, top0)
        top1 = tl.where(nonzero, below1, top1)
        top2 = tl.where(nonzero, below2, top2)
        sticky = tl.where(nonzero, rest, sticky)
        place = tl.where(nonzero, i, place)
        rest = rest | below2
        below2 = below1
        below1 = digit

    # Shift the three digits up until the highest bit of the 96 is set.
    shift = tl.zeros((), tl.int64)
    shifted = top0
    for log_step in tl.static_range(4, -1, -1):
        step = 1 << log_step
        leading = (shifted < (1 << (32 - step))) & (top0 != 0)
        shifted = tl.where(leading, shifted << step, shifted)
        shift += tl.where(leading, step, 0)
    upper = ((top0 << 32) | top1).to(tl.uint64, bitcast=True)
    moved = shift.to(tl.uint64)
    upper = (upper << moved) | (top2.to(tl.uint64) >> (32 - shift).to(tl.uint64))
    sticky = sticky | ((top2 << shift) & 0xFFFFFFFF) | (upper & 3).to(tl.int64)
    # 62 bits, the last of them "or something below": its conversion rounds as the whole sum does.
    significand = (upper >> 2).to(tl.int64) | (sticky != 0).to(tl.int64)
    # The 96 bits are units of 2^(32·place - 64 - 149); 34 of them were cut off, `shift` added.
    exponent = 34 - shift + 32 * place - 64 - 149
    power = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    total = significand.to(tl.float64) * power * sign.to(tl.float64)
    mean = total / count.to(tl.float64)

    nan = tl.sum(tl.where(column == DIGITS, sums, 0), axis=0) > 0
    up = tl.sum(tl.where(column == DIGITS + 1, sums, 0), axis=0) > 0
    down = tl.sum(tl.where(column == DIGITS + 2, sums, 0), axis=0) > 0
    offset = mean.to(tl.float32)
    offset = tl.where(up, float("inf"), offset)
    offset = tl.where(down, float("-inf"), offset)
    offset = tl.where(nan | (up & down), float("nan"), offset)
    tl.store(offset_ptr, offset)


@triton.jit
def _encode_scales_kernel(
    absmax_ptr,
    offset_ptr,
    scale_codebook_ptr,
    scale_codes_ptr,
    scale_absmax_ptr,
    count,
    SCALE_BLOCK_SIZE: tl.constexpr,
):
    """scale_absmax and scale_codes of one second-level block, a power of two of scales."""
    offs_code = tl.arange(0, 256)
    codebook = tl.load(scale_codebook_ptr + offs_code)
    following = tl.load(scale_codebook_ptr + offs_code + 1, mask=offs_code < 255, other=0.0)
    midpoints = tl.where(offs_code < 255, (codebook + following) * 0.5, float("inf"))
    zero_code = tl.argmin(tl.abs(codebook), axis=0).to(tl.int32)

    offs = tl.program_id(0).to(tl.int64) * SCALE_BLOCK_SIZE + tl.arange(0, SCALE_BLOCK_SIZE)
    mask = offs < count
    centred = tl.load(absmax_ptr + offs, mask=mask, other=0.0) - tl.load(offset_ptr)
    # As bit patterns, because a maximum of floats need not keep a NaN.
    magnitude = tl.where(mask, centred.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest = tl.max(magnitude, axis=0)
    scale_absmax = largest.to(tl.float32, bitcast=True)
    tl.store(scale_absmax_ptr + tl.program_id(0), scale_absmax)

    usable = (largest > 0) & (largest <= 0x7F800000)
    # 2^-126 keeps the inverse finite for zeros and denormals.
    divisor = tl.where(usable, tl.maximum(scale_absmax, 1.1754943508222875e-38), 1.0)
    normalised = centred * tl.div_rn(tl.full((), 1.0, tl.float32), divisor)
    codes = tl.zeros((SCALE_BLOCK_SIZE,), tl.int32)
    for log_step in tl.static_range(7, -1, -1):
        step = 1 << log_step
        limit = lookup_tile(midpoints, codes + (step - 1))
        # Infinite scales normalise to NaN, which the reference's search places last.
        codes += tl.where(normalised <= limit, 0, step)
    codes = tl.where(usable, codes, zero_code)
    tl.store(scale_codes_ptr + offs, codes.to(tl.uint8), mask=mask)
