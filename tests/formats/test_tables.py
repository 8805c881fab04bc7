"""Built-in tables against what was published, and made anew from their definitions."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch

from qlora_kernels.errors import ArgumentError
from qlora_kernels.formats import Codebook, Format, get_format, quantile_book
from qlora_kernels.formats.af4 import af4
from qlora_kernels.formats.block_maximum import BlockMaximum, gaussian_nmse_db, optimal_table
from qlora_kernels.formats.bof import bof
from qlora_kernels.formats.make_tables import BLOCK_SIZES, BOF, solve
from qlora_kernels.formats.nf4 import NF4
from qlora_kernels.formats.nfk import nfk
from qlora_kernels.formats.optimal_tables import TABLES
from qlora_kernels.formats.sf4 import sf, student_cdf, student_quantile

# Yoshida 2023, the AF4-64 table (as in bitsandbytes' get_4bit_type).
AF4_64 = """-1.0 -0.69441008 -0.51243739 -0.3736951 -0.25607552 -0.14982478 -0.04934812 0.0
0.04273164 0.12934483 0.21961274 0.31675666 0.42563882 0.55496234 0.72424863 1.0"""
# Dotzel et al. 2024, the tables of llm-datatypes (SF4_4, SF4_5, SF4_6: degrees of freedom).
SF4 = {
    4: """-1.0 -0.608729 -0.435845 -0.318393 -0.225229 -0.144689 -0.070863 0.0 0.061908 0.125773
0.193936 0.269711 0.358617 0.471724 0.638231 1.0""",
    5: """-1.0 -0.627781 -0.454736 -0.334331 -0.237434 -0.152899 -0.074982 0.0 0.065513 0.132965
0.204661 0.283835 0.375805 0.491076 0.656781 1.0""",
    6: """-1.0 -0.640101 -0.467104 -0.344838 -0.245517 -0.15835 -0.077722 0.0 0.067911 0.137742
0.211771 0.293169 0.387111 0.503714 0.66875 1.0""",
}
# llm-datatypes' NF3, and the 2- and 3-bit tables of NF4's own outermost probability.
NF3_TAILS = """-1.0 -0.5350227084855379 -0.24693143181157517 0.0 0.18333748033548752
0.3819939543209139 0.6229857417143423 1.0"""


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split()]


def largest_difference(codebook: Codebook, published: list[float]) -> float:
    assert len(codebook.values) == len(published)
    return max(abs(a - b) for a, b in zip(codebook.values, published, strict=True))


def test_af4_is_the_published_table() -> None:
    assert largest_difference(af4(64), numbers(AF4_64)) < 6e-8


@pytest.mark.parametrize("degrees", SF4)
def test_sf4_is_the_published_table(degrees: int) -> None:
    assert largest_difference(sf(4, degrees), numbers(SF4[degrees])) < 6e-7


def test_nf3_and_nf2_are_what_their_conventions_say() -> None:
    assert largest_difference(nfk(3, "tails"), numbers(NF3_TAILS)) < 1e-7
    assert largest_difference(nfk(2, "offset"), [-1.0, 0.0, 0.33792, 1.0]) < 5e-6
    assert largest_difference(nfk(2, "symmetric"), [-1.0, -0.25257, 0.25257, 1.0]) < 5e-5
    assert largest_difference(nfk(4, "offset"), list(NF4.values)) < 2e-7
    apart = max(
        abs(a - b) for a, b in zip(nfk(3, "offset").values, nfk(3, "tails").values, strict=True)
    )
    assert apart == pytest.approx(0.060, abs=1e-3)


def test_student_quantiles_invert_their_distribution() -> None:
    for degrees in (1, 2, 3, 5, 8):
        for p in (0.51, 0.7, 0.9, 0.99):
            assert student_cdf(student_quantile(p, degrees), degrees) == pytest.approx(p, abs=1e-12)
    # One degree is the Cauchy distribution, and many are nearly the normal one.
    assert student_quantile(0.75, 1) == pytest.approx(1.0)
    assert student_quantile(0.9, 5) == pytest.approx(1.475884049)
    normal = statistics.NormalDist().inv_cdf(0.9)
    assert student_quantile(0.9, 400) == pytest.approx(normal, abs=3e-3)


def test_integer_and_float_tables_are_their_grids() -> None:
    magnitudes = [0.5, 1, 1.5, 2, 3, 4, 6]
    e2m1 = [-m for m in reversed(magnitudes)] + [0] + magnitudes
    assert list(get_format("mxfp4").codebook.values) == e2m1
    assert [6 * value for value in get_format("e2m1").codebook.values] == pytest.approx(e2m1)
    sixteenths = [16 * value for value in get_format("e3m0").codebook.values]
    assert sixteenths == [-16, -8, -4, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert [8 * value for value in get_format("int4_full").codebook.values] == list(range(-8, 8))
    grid = get_format("int4_asym").codebook.values
    assert [15 * value for value in grid] == pytest.approx(list(range(-15, 16, 2)))


def test_bof_at_2_bits_and_its_signed_gain() -> None:
    assert largest_difference(bof(2, 64, True), [-0.4456, 0.0, 0.3774, 1.0]) < 5e-5
    # The codes above 0 are those of the unsigned table: both halves are optimal by themselves.
    assert bof(4, 64, True).values[7:] == bof(4, 64, False).values[7:]
    assert gaussian_nmse_db(bof(4, 64, False).values, 64) == pytest.approx(-20.97, abs=5e-3)
    assert gaussian_nmse_db(bof(4, 64, True).values, 64, True) == pytest.approx(-21.33, abs=1e-2)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_solved_anew(kind: str) -> None:
    """What make_tables.py would write today, for one of the quick block sizes."""
    block_size = 64
    assert TABLES[kind].keys() == set(BLOCK_SIZES) and set(TABLES) == {"af4", *BOF}
    solved = solve(kind, block_size)
    assert max(abs(a - b) for a, b in zip(solved, TABLES[kind][block_size], strict=True)) < 2e-9


@pytest.mark.parametrize("block_size", [16, 512, 4096])
def test_values_are_the_means_of_their_cells(block_size: int) -> None:
    """The condition of an optimum, checked by a sum over a fine grid of x."""
    table = torch.tensor(bof(4, block_size, True).values, dtype=torch.float64)
    x = torch.linspace(-1, 1, 16_001, dtype=torch.float64)[1::2].contiguous()
    up_to = BlockMaximum(block_size).moments(2)
    density = up_to(x + 1e-4)[0] - up_to(x - 1e-4)[0]
    cell = torch.bucketize(x, (table[1:] + table[:-1]) / 2)
    mean = torch.bincount(cell, density * x) / torch.bincount(cell, density)
    pinned = (table == 0) | (table == 1)
    assert torch.where(pinned, 0.0, mean - table).abs().max() < 2e-4


def test_a_change_of_an_optimal_table_is_worse() -> None:
    values = list(bof(3, 64, True).values)
    best = gaussian_nmse_db(values, 64, signed=True)
    for i, value in enumerate(values):
        for moved in (value - 0.01, value + 0.01):
            changed = [*values[:i], moved, *values[i + 1 :]]
            if value not in (0.0, 1.0):
                assert gaussian_nmse_db(changed, 64, signed=True) > best


def test_block_sizes_and_bits_without_a_stored_table_are_solved() -> None:
    book = bof(2, 48, True)
    assert book.values[1:2] == (0.0,) and book.values[3] == 1.0
    assert book.values[0] == pytest.approx(optimal_table(4, 48, (0.0, 1.0))[0], abs=1e-7)
    assert bof(3, 64, False).values[::7] == (-1.0, 1.0)
    for bad in ({"bits": 5}, {"criterion": "max"}):
        with pytest.raises(ArgumentError, match="bof: "):
            bof(**{"bits": 4, "block_size": 64, "signed": True, **bad})  # type: ignore[arg-type]


def test_what_a_format_derives_from_its_table() -> None:
    nf4, e2m1 = get_format("nf4"), get_format("e2m1")
    assert nf4.has_zero and not get_format("nf2_symmetric").has_zero
    assert nf4.boundaries == nf4.codebook.encoder.boundaries and len(nf4.boundaries) == 15
    middles = [6 * boundary for boundary in e2m1.boundaries]
    assert middles[7:] == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    assert nf4.bits_per_param((4096, 4096)) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2


def test_a_table_per_block_size_follows_the_block_size() -> None:
    fmt = get_format("af4")
    wide = fmt.override(block_size=256)
    assert fmt.codebook != wide.codebook and wide.codebook == af4(256)
    assert wide.override(block_size=64) == fmt
    fixed = fmt.with_codebook(NF4)
    assert fixed.override(block_size=256).codebook == NF4
    assert dataclasses.replace(fmt, scale_store="fp16").codebook == fmt.codebook


@pytest.mark.parametrize("name", ["qtip", "AQLM", "quip#", "quip-sharp", "higgs"])
def test_other_kinds_of_quantization_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"one table of at most 16 values .*: .*(code|sums)"):
        get_format(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codebook": None}, "codebook must be a Codebook, or a rule"),
        ({"scale_rule": "max"}, 'scale_rule must be one of "absmax"'),
        ({"scale_store": "fp8"}, 'scale_store must be one of "fp32"'),
        ({"encoder": "best"}, "encoder must be one of"),
        ({"scale_rule": "minmax"}, 'shift must be "min" with scale_rule "minmax"'),
        ({"shift": "min"}, 'shift must be "min" with scale_rule "minmax"'),
        ({"scale_rule": "signed_absmax", "scale_store": "e8m0"}, "scale_store must be one with a"),
        ({"encode_against": "original", "encoder": "scale_search"}, 'must be "decoded" unless'),
        ({"pack": "dense"}, "at most 8 values to be packed densely"),
        ({"pins": (0.0,)}, "pins must be empty unless a table is learned"),
        ({"pins": range(16), "lut_scope": "row"}, "pins must be fewer than the table's values"),
    ],
)
def test_fields_that_exclude_each_other_are_refused(fields: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises((ArgumentError, TypeError), match=f"Format: .*{message}|{message}"):
        Format("bad", **{"codebook": NF4, **fields})


def test_quantile_book_takes_any_distribution() -> None:
    book = quantile_book(statistics.NormalDist(0, 3).inv_cdf, 4, 0.9677083)
    assert largest_difference(book, list(NF4.values)) < 2e-7
    for bad in ({"bits": 5}, {"offset": 0.4}):
        with pytest.raises(ArgumentError, match="quantile_book: "):
            quantile_book(statistics.NormalDist().inv_cdf, **bad)  # type: ignore[arg-type]
