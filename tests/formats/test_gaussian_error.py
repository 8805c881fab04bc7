"""Each format's error on normal weights: its own closed form, and what was published."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.formats import Format, get_format
from qlora_kernels.formats.block_maximum import BlockMaximum, gaussian_nmse_db
from tests.formats.gaussian import by_block_maximum, by_range, normal_blocks

TOLERANCE_DB = 0.02
# fp32 scales, normal weights in blocks of 64 but for the MX formats: 2^24 samples each.
MEASURED_ELSEWHERE = {
    "nf4": -20.73,
    "fp4": -18.28,
    "e2m1": -19.52,
    "e3m0": -14.51,
    "int4": -19.36,
    "int4_full": -20.46,
    "int4_asym": -20.95,
    "af4": -20.39,
    "sf4": -19.66,
    "bof4": -20.97,
    "bof4s": -21.33,
    "nf3_offset": -13.91,
    "nf3_tails": -14.10,
    "bof3s": -15.07,
    "nf2_offset": -5.00,
    "nf2_symmetric": -6.77,
    "bof2s": -8.58,
    "mxfp4": -18.79,
    "nvfp4": -20.44,
}
CLOSED = [
    name
    for name in qlk.list_formats()
    if (fmt := get_format(name)).lut_scope == "global"
    and fmt.encoder == "nearest"
    and (fmt.shift == "none" or fmt.scale_rule == "minmax")
    and fmt.scale_rule != "rms"
]


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return normal_blocks(64)


def measured(w: torch.Tensor, qw: qlk.QuantizedWeight) -> float:
    """NMSE in dB of standard normal weights."""
    error = (qlk.dequantize(qw) - w).double().square().mean()
    return 10 * math.log10(float(error))


def exact_scales(fmt: Format) -> Format:
    """The format with fp32 scales where its store is only a means of saving bits."""
    if fmt.scale_store in ("e4m3", "e8m0", "fp16"):
        return fmt
    return dataclasses.replace(fmt, scale_store="fp32")


def test_most_formats_have_a_closed_form() -> None:
    assert set(MEASURED_ELSEWHERE) <= set(CLOSED)


@pytest.mark.parametrize("name", CLOSED)
def test_error_is_that_of_the_closed_form(name: str) -> None:
    fmt = exact_scales(get_format(name))
    weights = normal_blocks(fmt.block_size)
    qw = qlk.quantize(weights, fmt)
    got = measured(weights, qw)
    wanted = by_range(fmt) if fmt.scale_rule == "minmax" else by_block_maximum(fmt, qw.scale_absmax)
    assert got == pytest.approx(wanted, abs=TOLERANCE_DB)
    if name in MEASURED_ELSEWHERE:
        assert wanted == pytest.approx(MEASURED_ELSEWHERE[name], abs=TOLERANCE_DB)


@pytest.mark.parametrize("block_size", [32, 256])
@pytest.mark.parametrize("name", ["bof4s", "af4", "bof2s", "nf4"])
def test_other_block_sizes(name: str, block_size: int) -> None:
    fmt = dataclasses.replace(get_format(name), block_size=block_size, scale_store="fp32")
    weights = normal_blocks(block_size)
    got = measured(weights, qlk.quantize(weights, fmt))
    assert got == pytest.approx(by_block_maximum(fmt, None), abs=TOLERANCE_DB)


@pytest.mark.parametrize("name", ["nf4", "bof4s", "int4_full", "sf4"])
@pytest.mark.parametrize("store", ["fp16", "double_quant", "int8_mean", "uint8_min", "sign7"])
def test_8_bit_scales_cost_little(normal: torch.Tensor, name: str, store: str) -> None:
    """Codes against the decoded scale: a hundredth of a dB at most, two for signed scales in
    stores that are made for positive ones."""
    fmt = dataclasses.replace(get_format(name), encode_against="decoded")
    signed = fmt.scale_rule == "signed_absmax"
    exact = measured(normal, qlk.quantize(normal, dataclasses.replace(fmt, scale_store="fp32")))
    got = measured(normal, qlk.quantize(normal, dataclasses.replace(fmt, scale_store=store)))
    made_for_it = store in ("fp16", "sign7") or not signed
    assert got - exact < (0.01 if made_for_it else 0.02)


def test_power_of_two_scales_need_decoded_encoding(normal: torch.Tensor) -> None:
    """Encoded against the scale before rounding, the error is several times as large."""
    small = normal[:4096]
    fmt = Format("p", get_format("nf4").codebook, scale_store="e8m0")
    decoded = measured(small, qlk.quantize(small, fmt))
    careless = dataclasses.replace(fmt, encode_against="original")
    assert measured(small, qlk.quantize(small, careless)) > decoded + 5


def test_e4m3_scales_are_double_quantizations_size_at_its_error(normal: torch.Tensor) -> None:
    nf4 = dataclasses.replace(get_format("nf4"), encode_against="decoded")
    e4m3 = qlk.quantize(normal, dataclasses.replace(nf4, scale_store="e4m3"))
    exact = qlk.quantize(normal, dataclasses.replace(nf4, scale_store="fp32"))
    assert e4m3.bits_per_parameter == pytest.approx(4.125, abs=1e-4)
    assert measured(normal, e4m3) - measured(normal, exact) < 0.06


def test_maximum_is_a_distribution() -> None:
    for block_size in (16, 64, 4096):
        block = BlockMaximum(block_size)
        assert float(block.weight.sum()) == pytest.approx(1, abs=1e-12)
        # Up to 1 all but the maximum itself, half on either side.
        mass, _ = block.moments(0)(torch.tensor([-1.0, 1.0]))
        assert mass.tolist() == pytest.approx([-0.5 + 0.5 / block_size, 0.5 - 0.5 / block_size])
    assert gaussian_nmse_db([-1.0, 1.0], 64) > gaussian_nmse_db([-1.0, 0.0, 1.0], 64)
