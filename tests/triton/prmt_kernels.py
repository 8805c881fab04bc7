"""Kernels of the tests of kernels/prmt.py; in a file of their own because Triton reads sources."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tables_kernel(codebook_ptr, tables_ptr, byte_tables: tl.constexpr, DTYPE: tl.constexpr):
    """The eight words of a table [16] to tables [8]; byte_tables is the tile function."""
    tables = byte_tables(codebook_ptr, tl.full((1, 1, 1), 1.0, tl.float32), DTYPE, (1, 1, 1))
    place = tl.zeros((1, 1, 1), tl.int32)
    for i in tl.static_range(8):
        tl.store(tables_ptr + i + place, tables[i])


@triton.jit
def unpack_kernel(pairs_ptr, values_ptr, unpack_pairs: tl.constexpr, COUNT: tl.constexpr):
    """int32 pairs [4, COUNT] to bf16 bits [8·COUNT]; unpack_pairs is the tile function."""
    place = tl.arange(0, COUNT)
    p0 = tl.load(pairs_ptr + place)
    p1 = tl.load(pairs_ptr + COUNT + place)
    p2 = tl.load(pairs_ptr + 2 * COUNT + place)
    p3 = tl.load(pairs_ptr + 3 * COUNT + place)
    values = unpack_pairs(p0, p1, p2, p3, tl.bfloat16).reshape(8 * COUNT)
    tl.store(values_ptr + tl.arange(0, 8 * COUNT), values.to(tl.uint16, bitcast=True))


@triton.jit
def decode_kernel(
    words_ptr,
    codebook_ptr,
    values_ptr,
    byte_tables: tl.constexpr,
    decode: tl.constexpr,
    DTYPE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Words [COUNT] to values [8·COUNT]; for GPUs, as the interpreter has no inline PTX."""
    tables = byte_tables(codebook_ptr, tl.full((1,), 1.0, tl.float32), DTYPE, (1,))
    words = tl.load(words_ptr + tl.arange(0, COUNT))
    values = decode(words, tables, DTYPE).reshape(8 * COUNT)
    tl.store(values_ptr + tl.arange(0, 8 * COUNT), values)
