"""quantize on the CPU equals the reference bit for bit, on every path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kernels.backends.cpu.common import machine_isa
from qlora_kernels.backends.cpu.quantize import quantize_cpu
from qlora_kernels.formats import Codebook, get_format
from qlora_kernels.formats.packing import n_blocks, unpack
from qlora_kernels.reference import quantize_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.shapes import BLOCK_SIZES, CODEC_NUMELS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODEBOOKS = {name: get_format(name).codebook for name in ("nf4", "fp4", "int4")} | {
    "two": Codebook("two", values=[-1.0, 1.0]),
    "unsorted": Codebook("unsorted", values=[0.9, -0.2, 0.4, -1.0, 0.1]),
    "duplicates": Codebook("duplicates", values=[-1.0, 0.25, 0.25, 1.0, -1.0, 0.5]),
    "one_sided": Codebook("one_sided", values=[0.1 * i for i in range(1, 17)]),
}


def encoder_arguments(codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor, int]:
    encoder = codebook.encoder
    boundaries = torch.tensor(encoder.boundaries, dtype=torch.float32)
    return boundaries, torch.tensor(encoder.rank_codes, dtype=torch.uint8), encoder.zero_code


def decoded_arguments(codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor, int]:
    encoder = codebook.exact_encoder
    boundaries = torch.tensor(encoder.boundaries, dtype=torch.float64)
    return boundaries, torch.tensor(encoder.rank_codes, dtype=torch.uint8), encoder.zero_code


def check(isa: int, weight: torch.Tensor, codebook: Codebook, block_size: int) -> None:
    arguments = (weight, *encoder_arguments(codebook), block_size)
    codes, absmax = quantize_cpu(isa, *arguments)
    expected_codes, expected_absmax = quantize_reference(*arguments)
    assert_bitwise_equal(absmax, expected_absmax, "absmax")
    assert_bitwise_equal(codes, expected_codes, "codes")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_equals_reference(isa: int, block_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(block_size)
    for numel in CODEC_NUMELS:
        check(isa, torch.randn(numel, generator=generator).to(dtype), CODEBOOKS["nf4"], block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_quantize_takes_any_table(isa: int, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for numel in (255, 4096):
        check(isa, torch.randn(numel).to(dtype), CODEBOOKS[name], 64)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "one_sided"])
def test_quantize_is_exact_on_and_around_boundaries(isa: int, name: str) -> None:
    # With absmax 1 the normalised value is the weight itself: every boundary, and both fp32
    # neighbours of it.
    boundaries = encoder_arguments(CODEBOOKS[name])[0]
    infinity = torch.full_like(boundaries, math.inf)
    around = torch.cat(
        [boundaries, boundaries.nextafter(infinity), boundaries.nextafter(-infinity)]
    ).clamp(-1, 1)
    check(
        isa,
        torch.cat([torch.ones(1), around, torch.zeros(1), -torch.zeros(1)]),
        CODEBOOKS[name],
        64,
    )


def test_quantize_normalises_by_multiplying_with_the_reciprocal(isa: int) -> None:
    # Divided, and multiplied by the rounded reciprocal, differ in the last bit for about a quarter
    # of all quotients; scaled boundaries turn that bit into a code.
    boundaries = encoder_arguments(CODEBOOKS["nf4"])[0]
    scales = 1.0 + torch.rand(4000, generator=torch.Generator().manual_seed(2))
    weight = torch.zeros(len(scales), 64)
    weight[:, 0] = scales
    weight[:, 1:16] = boundaries * scales[:, None]
    check(isa, weight, CODEBOOKS["nf4"], 64)
    divided = torch.searchsorted(boundaries, weight / scales[:, None])
    multiplied = torch.searchsorted(boundaries, weight * (1.0 / scales)[:, None])
    assert (divided != multiplied).sum() > 100, "the weights must tell the two rules apart"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "unsorted"])
def test_quantize_of_zero_blocks(isa: int, name: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(333, dtype=dtype)
    weight[::2] = -0.0
    check(isa, weight, CODEBOOKS[name], 32)
    codes, absmax = quantize_cpu(isa, weight, *encoder_arguments(CODEBOOKS[name]), 32)
    assert (unpack(codes, 334) == CODEBOOKS[name].zero_code).all()
    assert (absmax == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_quantize_marks_only_the_block_that_is_not_finite(
    isa: int, value: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    for position in (0, 31, 64, 100, 319, 320, 330):
        weight = torch.randn(331).to(dtype)
        weight[position] = value
        check(isa, weight, CODEBOOKS["nf4"], 64)
        absmax = quantize_cpu(isa, weight, *encoder_arguments(CODEBOOKS["nf4"]), 64)[1]
        assert absmax.isnan().nonzero().flatten().tolist() == [position // 64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_honours_denormals(isa: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    smallest = torch.finfo(dtype).smallest_normal
    for scale in (smallest, smallest / 4, smallest / 64):
        weight = (torch.randn(640).double() * scale).to(dtype)
        assert (weight != 0).any()
        check(isa, weight, CODEBOOKS["nf4"], 64)
        check(isa, weight, CODEBOOKS["fp4"], 64)


def test_quantize_of_extreme_magnitudes(isa: int) -> None:
    torch.manual_seed(5)
    for exponent in (-148, -127, -126, -30, 30, 100, 125):
        check(isa, torch.randn(200).clamp(-4, 4) * 2.0**exponent, CODEBOOKS["nf4"], 32)


def test_quantize_pads_an_odd_length_with_the_zero_code(isa: int) -> None:
    for name, codebook in CODEBOOKS.items():
        codes, _ = quantize_cpu(isa, torch.ones(65), *encoder_arguments(codebook), 64)
        assert int(codes[-1]) & 15 == codebook.zero_code, name


def test_quantize_reads_any_layout(isa: int) -> None:
    torch.manual_seed(6)
    wide = torch.randn(50, 70)
    for weight in (wide.t(), wide[:, 3:40], wide[::2], wide.expand(2, 50, 70), wide[0, 5]):
        check(isa, weight, CODEBOOKS["nf4"], 32)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("name", ["nf4", "fp4", "two"])
def test_quantize_against_decoded_scales(isa: int, name: str, block_size: int) -> None:
    torch.manual_seed(7)
    for numel in (1, 63, 4097, 9000):
        weight = torch.randn(numel).bfloat16()
        scales = torch.randn(n_blocks(numel, block_size)) * 3
        scales[::5] = 0.0
        scales[1::7] = math.nan
        scales[2::11] = math.inf
        arguments = (weight, *decoded_arguments(CODEBOOKS[name]), block_size, scales)
        for got, expected in zip(
            quantize_cpu(isa, *arguments), quantize_reference(*arguments), strict=True
        ):
            assert_bitwise_equal(got, expected)


def test_quantize_against_decoded_scales_breaks_exact_ties_downwards(isa: int) -> None:
    codebook = Codebook("halves", values=[-1.0, -0.5, 0.0, 0.5, 1.0])
    weight = torch.tensor([0.75, 0.25, -0.25, -0.75] * 16)
    for scale in (1.0, -1.0, 0.5):
        arguments = (weight * abs(scale), *decoded_arguments(codebook), 64, torch.tensor([scale]))
        codes = unpack(quantize_cpu(isa, *arguments)[0], 64)[:4].tolist()
        # The lower table value: for a negative scale that is the larger product.
        expected = [3, 2, 1, 0] if scale > 0 else [0, 1, 2, 3]
        assert codes == expected


@pytest.mark.parametrize("name", ["nf4", "int4", "one_sided"])
def test_quantize_against_decoded_scales_is_exact_around_the_limits(isa: int, name: str) -> None:
    """Weights next to midpoint times scale, which is no fp32 number: a kernel that rounded it the
    other way would be one code off. Scales from denormal ones to near the largest, of both signs.
    """
    boundaries, *rest = decoded_arguments(CODEBOOKS[name])
    scales = torch.randn(600, generator=torch.Generator().manual_seed(9))
    scales[::50] *= 2.0**-140
    scales[7::50] *= 2.0**120
    limits = (boundaries[None, :] * scales.double()[:, None]).float()
    infinity = torch.full_like(limits, math.inf)
    around = [limits, limits.nextafter(infinity), limits.nextafter(-infinity)]
    weight = torch.zeros(len(scales), 64)
    weight[:, : 3 * len(boundaries)] = torch.cat(around, dim=1)
    arguments = (weight, boundaries, *rest, 64, scales)
    assert_bitwise_equal(quantize_cpu(isa, *arguments)[0], quantize_reference(*arguments)[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_quantize_equals_reference_on_any_bits(data: st.DataObject) -> None:
    numel = data.draw(st.integers(1, 300))
    width, storage, dtype = data.draw(
        st.sampled_from(
            [
                (2**32, torch.int64, torch.float32),
                (2**16, torch.int32, torch.float16),
                (2**16, torch.int32, torch.bfloat16),
            ]
        )
    )
    seed = data.draw(st.integers(0, 2**31))
    bits = torch.randint(0, width, (numel,), generator=torch.Generator().manual_seed(seed))
    bits = (bits - width * (bits >= width // 2)).to(
        torch.int32 if storage == torch.int64 else torch.int16
    )
    weight = bits.view(dtype)
    if data.draw(st.booleans()):
        weight = weight.nan_to_num(0.0, 1.0, -1.0)
    block_size = data.draw(st.sampled_from([32, 64, 128]))
    for isa in range(machine_isa() + 1):
        check(isa, weight, CODEBOOKS["nf4"], block_size)


def test_quantize_is_the_same_for_every_number_of_threads(isa: int) -> None:
    torch.manual_seed(8)
    weight = torch.randn(300_001)
    arguments = (weight, *encoder_arguments(CODEBOOKS["nf4"]), 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = quantize_cpu(isa, *arguments)
        torch.set_num_threads(3)
        several = quantize_cpu(isa, *arguments)
    finally:
        torch.set_num_threads(threads)
    for one, many in zip(single, several, strict=True):
        assert_bitwise_equal(many, one)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_quantize_equals_bitsandbytes(isa: int, name: str, block_size: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(9)
    weight = torch.randn(64, 4096)
    weight[3] = 0.0
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type=name)
    codes, absmax = quantize_cpu(isa, weight, *encoder_arguments(CODEBOOKS[name]), block_size)
    assert_bitwise_equal(absmax, state.absmax)
    ours, theirs = unpack(codes, weight.numel()), unpack(packed.reshape(-1), weight.numel())
    if name == "fp4":
        # Of its two zeros bitsandbytes' CPU path takes code 8, its CUDA path the one of n's sign.
        ours, theirs = ours.where(ours != 8, 0), theirs.where(theirs != 8, 0)
    assert_bitwise_equal(ours, theirs)


def test_binding_rejects_what_would_corrupt_memory(isa: int) -> None:
    weight = torch.randn(128)
    boundaries, rank_codes, zero_code = encoder_arguments(CODEBOOKS["nf4"])
    with pytest.raises(RuntimeError, match="block_size must be a power of two"):
        quantize_cpu(isa, weight, boundaries, rank_codes, zero_code, 48)
    with pytest.raises(RuntimeError, match="boundaries must have 15 elements, got 14"):
        quantize_cpu(isa, weight, boundaries[1:], rank_codes, zero_code, 64)
    with pytest.raises(RuntimeError, match="weight must be float32, float16 or bfloat16"):
        quantize_cpu(isa, weight.double(), boundaries, rank_codes, zero_code, 64)
    with pytest.raises(RuntimeError, match="scales must have 2 elements, got 1"):
        quantize_cpu(isa, weight, boundaries.double(), rank_codes, zero_code, 64, torch.ones(1))
    with pytest.raises(RuntimeError, match="isa must be at most"):
        quantize_cpu(99, weight, boundaries, rank_codes, zero_code, 64)
