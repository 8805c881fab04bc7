"""double_quantize on the CPU equals the reference bit for bit, on every path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kernels.backends.cpu.common import machine_isa
from qlora_kernels.backends.cpu.double_quantize import double_quantize_cpu
from qlora_kernels.formats.dynamic8 import ZERO_CODE, dynamic8_table
from qlora_kernels.reference import double_quantize_reference
from qlora_kernels.testing.errors import assert_bitwise_equal

NAMES = ("scale_codes", "scale_absmax", "scale_offset")


def check(
    isa: int, absmax: torch.Tensor, scale_block_size: int = 256, table: torch.Tensor | None = None
) -> None:
    table = dynamic8_table() if table is None else table
    got = double_quantize_cpu(isa, absmax, table, scale_block_size)
    expected = double_quantize_reference(absmax, table, scale_block_size)
    for name, mine, theirs in zip(NAMES, got, expected, strict=True):
        assert_bitwise_equal(mine, theirs, name)


@pytest.mark.parametrize("scale_block_size", [1, 7, 64, 256, 4096])
def test_double_quantize_equals_reference(isa: int, scale_block_size: int) -> None:
    generator = torch.Generator().manual_seed(scale_block_size)
    for count in (0, 1, 2, 7, 8, 15, 17, 255, 256, 257, 8191, 8193, 40_001):
        check(isa, torch.randn(count, generator=generator).abs() + 0.5, scale_block_size)


def test_double_quantize_is_exact_on_and_around_midpoints(isa: int) -> None:
    # An offset of 0 and a largest scale of 1 make the normalised value the scale itself.
    table = dynamic8_table()
    midpoints = (table[:-1] + table[1:]) * 0.5
    above = midpoints.nextafter(torch.full_like(midpoints, math.inf))
    below = midpoints.nextafter(torch.full_like(midpoints, -math.inf))
    values = torch.cat([midpoints, above, below])
    absmax = torch.cat([values, -values, torch.tensor([1.0, -1.0])])
    codes, scale, offset = double_quantize_cpu(isa, absmax, table, 4096)
    assert (float(offset), float(scale)) == (0.0, 1.0)
    assert codes[:255].tolist() == list(range(255)), "a tie goes to the lower value"
    assert codes[255:510].tolist() == list(range(1, 256))
    check(isa, absmax, 4096)


def test_double_quantize_sums_exactly(isa: int) -> None:
    # Plain fp64 accumulation loses the small terms to the large ones, which then cancel.
    absmax = torch.full((100_001,), 2.0**-20)
    absmax[0], absmax[-1] = 2.0**40, -(2.0**40)
    offset = double_quantize_cpu(isa, absmax, dynamic8_table(), 256)[2]
    assert float(offset) == torch.tensor(99_999 * 2.0**-20 / 100_001).item()
    assert float(absmax.double().cumsum(0)[-1]) == 0.0, "the numbers must tell"
    check(isa, absmax)
    generator = torch.Generator().manual_seed(0)
    for exponent in (1, 5, 20):
        spread = torch.randn(50_000, generator=generator) * exponent
        check(isa, spread.double().exp2().float())


def test_double_quantize_is_the_same_for_every_number_of_threads(isa: int) -> None:
    absmax = torch.rand(300_000, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(double_quantize_cpu(isa, absmax, dynamic8_table(), 256))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_bitwise_equal(got, expected)


def test_double_quantize_of_equal_scales_takes_the_code_of_zero(isa: int) -> None:
    for value in (0.0, 1.0, 3.25e-7):
        codes, scale, offset = double_quantize_cpu(
            isa, torch.full((300,), value), dynamic8_table(), 256
        )
        assert (codes == ZERO_CODE).all()
        assert (scale == 0).all()
        assert float(offset) == torch.tensor(value).item()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_double_quantize_of_a_scale_that_is_not_finite(isa: int, value: float) -> None:
    absmax = torch.rand(600)
    absmax[300] = value
    check(isa, absmax)
    opposed = absmax.clone()
    opposed[10] = -value
    check(isa, opposed)
    codes, scale, offset = double_quantize_cpu(isa, absmax, dynamic8_table(), 256)
    decoded = dynamic8_table()[codes.long()] * scale.repeat_interleave(256)[:600] + offset
    assert not decoded.isfinite().any(), "never plausible numbers"


def test_double_quantize_honours_denormals(isa: int) -> None:
    check(isa, torch.rand(1000) * 2.0**-130)


def test_double_quantize_takes_any_table(isa: int) -> None:
    torch.manual_seed(2)
    check(isa, torch.rand(5000), 256, torch.linspace(-1, 1, 256))
    check(isa, torch.rand(5000), 256, torch.randn(256).sort().values)


def test_double_quantize_of_nothing(isa: int) -> None:
    codes, scale, offset = double_quantize_cpu(isa, torch.empty(0), dynamic8_table(), 256)
    assert (codes.numel(), scale.numel(), offset.tolist()) == (0, 0, [0.0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 600), spread=st.integers(0, 40))
def test_double_quantize_equals_reference_at_any_scale(seed: int, count: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    absmax = (torch.randn(count, generator=generator).double() * spread).exp2().float()
    for isa in range(machine_isa() + 1):
        check(isa, absmax)


def test_double_quantize_equals_bitsandbytes_where_it_takes_the_nearest(isa: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(3)
    weight = torch.randn(256, 4096)
    _, plain = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    _, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    codes, scale, offset = double_quantize_cpu(isa, plain.absmax, dynamic8_table(), 256)
    if float(offset) == float(state.offset):
        assert_bitwise_equal(scale, state.state2.absmax)
    ulp = abs(float(offset)) * 2.0**-23
    assert abs(float(offset) - float(state.offset)) <= ulp
    # Its lookup grid misses the nearest entry by one code in about 0.2 % of cases, never by more.
    difference = codes.int() - state.absmax.int()
    assert int(difference.abs().max()) <= 1
    assert float((difference != 0).float().mean()) < 0.005
    differs = difference != 0
    centred = (plain.absmax - offset) / scale.repeat_interleave(256)
    table = dynamic8_table()
    mine = (table[codes.long()] - centred).abs()[differs]
    theirs = (table[state.absmax.long()] - centred).abs()[differs]
    assert (mine <= theirs + 1e-6).all(), "where the codes differ, ours is the nearer"


def test_binding_rejects_what_would_corrupt_memory(isa: int) -> None:
    with pytest.raises(RuntimeError, match="scale_codebook must have 256 elements, got 16"):
        double_quantize_cpu(isa, torch.rand(8), torch.rand(16), 256)
    with pytest.raises(RuntimeError, match="absmax must be Float, got Double"):
        double_quantize_cpu(isa, torch.rand(8).double(), dynamic8_table(), 256)
    native = torch.ops.qlora_kernels_cpu.double_quantize
    with pytest.raises(RuntimeError, match="scale_block_size must be positive, got 0"):
        native(
            torch.rand(8),
            dynamic8_table(),
            0,
            torch.empty(8, dtype=torch.uint8),
            torch.empty(1),
            torch.empty(1),
            isa,
        )
