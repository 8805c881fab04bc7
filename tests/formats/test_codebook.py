"""Codebooks: order, ties, boundaries, zero code, hash, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct

import pytest
import torch

from qlora_kernels.errors import ArgumentError
from qlora_kernels.formats import Codebook, Format, get_format, list_formats, register_format
from qlora_kernels.formats.dynamic8 import VALUES, ZERO_CODE


def _encode(codebook: Codebook, value: float) -> int:
    encoder = codebook.encoder
    return encoder.rank_codes[sum(value > boundary for boundary in encoder.boundaries)]


def test_dynamic8_is_the_map_in_every_checkpoint() -> None:
    digest = hashlib.sha256(struct.pack("<256f", *VALUES)).hexdigest()
    assert digest.startswith("e732639a65f497b4")
    assert VALUES[ZERO_CODE] == 0.0 and VALUES[255] == 1.0 and list(VALUES) == sorted(VALUES)


@pytest.mark.parametrize("name", list_formats())
def test_every_value_encodes_to_itself(name: str) -> None:
    codebook = get_format(name).codebook
    for value in codebook.values:
        assert codebook.values[_encode(codebook, value)] == value


@pytest.mark.parametrize("name", ["nf4", "int4"])
def test_a_tie_takes_the_lower_value(name: str) -> None:
    codebook = get_format(name).codebook
    encoder = codebook.encoder
    for rank, boundary in enumerate(encoder.boundaries):
        above = float(torch.nextafter(torch.tensor(boundary), torch.tensor(math.inf)))
        assert _encode(codebook, boundary) == encoder.rank_codes[rank]
        assert _encode(codebook, above) == encoder.rank_codes[rank + 1]


def test_fp4_is_sign_and_magnitude() -> None:
    fp4 = get_format("fp4").codebook
    assert _encode(fp4, 0.0) == 0 and _encode(fp4, -0.0) == 0 and _encode(fp4, -1e-44) == 8
    magnitudes = sorted(fp4.values[:8])
    for low, high in itertools.pairwise(magnitudes):
        midpoint = float(torch.tensor((low + high) / 2, dtype=torch.float32))
        assert abs(fp4.values[_encode(fp4, midpoint)]) == low
        assert abs(fp4.values[_encode(fp4, -midpoint)]) == low


def test_zero_codes() -> None:
    codes = {name: get_format(name).codebook.zero_code for name in ("nf4", "fp4", "int4")}
    assert codes == {"nf4": 7, "fp4": 0, "int4": 7}
    assert Codebook("two", [-0.5, 0.5]).zero_code == 0


def test_unused_codes_decode_to_nan() -> None:
    table = get_format("int4").codebook.table()
    assert table.shape == (16,) and table[15].isnan() and not table[:15].isnan().any()


def test_hash_is_of_the_content() -> None:
    assert Codebook("a", [0, 1]).content_hash == Codebook("b", [0, 1]).content_hash
    assert Codebook("a", [0, 1]).content_hash != Codebook("a", [0, 2]).content_hash


@pytest.mark.parametrize(
    "values", [[1.0], list(range(17)), [0.0, math.nan], [0.0, 1e300], [2.0, 2.0]], ids=str
)
def test_bad_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ArgumentError, match="Codebook: values must be"):
        Codebook("bad", values)


@pytest.mark.parametrize("block_size", [8, 96, 8192, 64.0, True])
def test_bad_block_sizes_are_refused(block_size: object) -> None:
    with pytest.raises(ArgumentError, match="a power of two in 16 … 4096"):
        Format("bad", get_format("nf4").codebook, block_size=block_size)  # type: ignore[arg-type]


def test_a_name_stands_for_one_format() -> None:
    register_format(get_format("nf4"))
    with pytest.raises(ArgumentError, match="already another format"):
        register_format(Codebook("nf4", [0, 1]))
    with pytest.raises(ArgumentError, match="one of"):
        get_format("nf5")
