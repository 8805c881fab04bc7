"""Decoding by byte permutation. The interpreter has no inline PTX: a model of its instructions runs
the very text that kernels compile, on every byte; what surrounds it is interpreted."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from qlora_kernels.formats import get_format, list_formats
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.triton import prmt_kernels
from tests.triton.checks import CODEBOOKS
from tests.triton.ptx_model import run_ptx

triton = pytest.importorskip("triton")
NARROW = (torch.float16, torch.bfloat16)
# Each byte in each place of a word, beside other bytes.
WORDS = torch.stack([(torch.arange(256) * step + shift) & 0xFF for step, shift in
                     ((1, 0), (7, 3), (11, 128), (255, 77))], -1)  # fmt: skip


def module() -> Any:
    """kernels/prmt.py, as it is now: a test of the tests exchanges it."""
    return import_module("qlora_kernels.backends.triton.kernels.prmt")


def tables_of_all() -> list[torch.Tensor]:
    """Every registered table and those of the checks, padded with NaN, and one of bit patterns."""
    books = [*CODEBOOKS.values(), *(get_format(name).codebook for name in list_formats())]
    tables = {book.table().numpy().tobytes(): book.table() for book in books}
    odd = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 6e4, 3.0, *torch.linspace(-2, 2, 10).tolist()])
    return [*tables.values(), odd]


def interpreted_tables(device: torch.device, table: torch.Tensor, dtype: Any) -> torch.Tensor:
    """The eight words, as the tile function makes them of the table."""
    words = torch.empty(8, dtype=torch.int32, device=device)
    names = {torch.float16: triton.language.float16, torch.bfloat16: triton.language.bfloat16}
    prmt_kernels.tables_kernel[(1,)](table.to(device), words, module().byte_tables, names[dtype])
    return words.cpu()


def registers(words: torch.Tensor, tables: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the instructions find: words in $4, tables in $5 ... $12."""
    return {"$4": words} | {f"${5 + i}": tables[i] for i in range(8)}


def packed(bytes_: torch.Tensor) -> torch.Tensor:
    """Bytes [..., 4] as words."""
    return sum(bytes_[..., i] << (8 * i) for i in range(4))


def codes(bytes_: torch.Tensor) -> torch.Tensor:
    """Codes [..., 8] of bytes [..., 4] in the order of the elements: the high nibble first."""
    return torch.stack([bytes_ >> 4, bytes_ & 15], -1).flatten(-2)


def results(state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Values [..., 8] in $0 ... $3."""
    halves = [(state[f"${i}"] >> shift) & 0xFFFF for i in range(4) for shift in (0, 16)]
    return torch.stack(halves, -1).to(torch.uint16).view(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_byte_of_every_table(device: torch.device, dtype: torch.dtype) -> None:
    for i, table in enumerate(tables_of_all()):
        bits = table.to(dtype).view(torch.uint16).to(torch.int64).reshape(4, 4)
        tables = torch.stack([packed(bits & 0xFF), packed(bits >> 8)], -1).flatten()
        if i % 8 == 0:
            interpreted = interpreted_tables(device, table, dtype).to(torch.int64) & 0xFFFFFFFF
            finite = bool(table.isfinite().all())
            assert not finite or torch.equal(interpreted, tables)
            tables = interpreted
        state = run_ptx(module().DECODE_PTX.value, registers(packed(WORDS), tables))
        wanted = table.to(dtype)[codes(WORDS)]
        real = ~wanted.isnan()
        assert_bitwise_equal(results(state, dtype)[real], wanted[real])


def test_scaled_pairs_round_like_their_parts(device: torch.device) -> None:
    scales = torch.tensor([1.0, -0.037, 0.7071067, 3.1e4, -1e-20, 3.3e38, 0.0, 1 + 2.0**-15])
    scales = scales.repeat(32)
    high = (scales.view(torch.int32) & -0x10000).view(torch.float32)
    low = (scales - high).bfloat16()

    def twice(value: torch.Tensor) -> torch.Tensor:
        bits = value.bfloat16().view(torch.uint16).to(torch.int64)
        return bits | (bits << 16)

    for name in ("nf4", "fp4", "int4"):
        table = CODEBOOKS[name].table()
        inputs = registers(packed(WORDS), interpreted_tables(device, table, torch.bfloat16))
        inputs |= {"$13": twice(high), "$14": twice(low)}
        state = run_ptx(module().DECODE_PTX.value + module().SCALE_PTX.value, inputs)
        values = table.bfloat16()[codes(WORDS)].double()
        small = (values * low.double()[:, None]).bfloat16().double()
        wanted = (values * high.double()[:, None] + small).bfloat16()
        got = results(state, torch.bfloat16)
        assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))
        # As near to the table's value times the scale as one rounding comes, nearly.
        exact = values * scales.double()[:, None]
        usual = exact.abs() > 2.0**-120
        error = ((got.double() - exact) / exact).abs()[usual]
        assert error.max() <= 2.0**-8 * (1 + 2.0**-6)


def test_pairs_are_unpacked_in_order(device: torch.device) -> None:
    values = torch.arange(32, dtype=torch.int32).reshape(4, 4, 2)  # word, pair, half
    pairs = (values[..., 0] | (values[..., 1] << 16)).T.contiguous()
    got = torch.empty(32, dtype=torch.uint16, device=device)
    prmt_kernels.unpack_kernel[(1,)](pairs.to(device), got, module().unpack_pairs, 4)
    assert got.cpu().to(torch.int32).tolist() == list(range(32))


def check_decode(device: torch.device, dtype: torch.dtype) -> None:
    """The instructions themselves, on a GPU, give what their model gives."""
    names = {torch.float16: triton.language.float16, torch.bfloat16: triton.language.bfloat16}
    kernels = module()
    words = packed(WORDS).to(device, torch.int32)
    for name in ("nf4", "fp4", "int4"):
        table = CODEBOOKS[name].table()
        got = torch.empty(2048, dtype=dtype, device=device)
        prmt_kernels.decode_kernel[(1,)](
            *(words, table.to(device), got, kernels.byte_tables, kernels.decode_words_prmt),
            *(names[dtype], 256),
        )
        wanted = table.to(dtype)[codes(WORDS)]
        real = ~wanted.isnan()
        assert_bitwise_equal(got.cpu().reshape(256, 8)[real], wanted[real])
