"""The 8-bit blockwise kernels equal the reference bit for bit, on every path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qlora_kernels.backends.cpu.blockwise import dequantize_blockwise_cpu, quantize_blockwise_cpu
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.reference.blockwise import (
    dequantize_blockwise_reference,
    quantize_blockwise_reference,
)
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.problems import DTYPES


def cases() -> Iterator[tuple[torch.Tensor, int]]:
    """Short last blocks, blocks around and above a chunk, in one with zeros alone a NaN beside, and
    absmax below the smallest normal number."""
    generator = torch.Generator().manual_seed(3)
    for shape, block_size in (((3, 333), 64), ((7, 1001), 100), ((1,), 256), ((0,), 64)):
        yield torch.randn(shape, generator=generator), block_size
    yield torch.randn(20_001, generator=generator) * torch.arange(20_001), 6000
    values = torch.randn(9000, generator=generator)
    values[:4096], values[4096], values[8999] = 0.0, torch.nan, torch.inf
    yield values, 1024
    yield torch.randn(2, 5000, generator=generator).t() * 1e-39, 8192


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blockwise_codes_are_the_references(isa: int, dtype: torch.dtype) -> None:
    table = dynamic8_table()
    for values, block_size in cases():
        values = values.to(dtype)
        wanted = quantize_blockwise_reference(values, table, block_size)
        got = quantize_blockwise_cpu(values, table, block_size, isa)
        for mine, theirs, name in zip(got, wanted, ("codes", "absmax"), strict=True):
            assert_bitwise_equal(mine, theirs, f"{name} of {tuple(values.shape)}, {block_size}")
        decoded = dequantize_blockwise_cpu(*wanted, table, block_size, dtype, isa)
        expected = dequantize_blockwise_reference(*wanted, table, block_size, dtype)
        assert_bitwise_equal(decoded, expected, f"{tuple(values.shape)}, {block_size}")


def test_blockwise_ties_go_to_the_lower_entry(isa: int) -> None:
    table = torch.linspace(-1, 1, 256)
    # absmax is 1, so that they are normalised as they are.
    values = torch.cat([(table[:-1] + table[1:]) * 0.5, torch.ones(1)])
    codes, absmax = quantize_blockwise_cpu(values, table, 256, isa)
    assert absmax.tolist() == [1.0]
    assert torch.equal(codes[:255].long(), torch.arange(255))
