"""quantize, dequantize, double_quantize and dropout equal the reference bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_kernels.backends.triton.dequantize import dequantize_triton
from qlora_kernels.backends.triton.dropout import dropout_triton
from qlora_kernels.formats import get_format, list_formats
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.packing import n_blocks
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import dequantize_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.shapes import BLOCK_SIZES, RAGGED_WEIGHTS
from tests.problems import DTYPES, SCALES, random_weight
from tests.triton.checks import (
    CODEBOOKS,
    check_dequantize,
    check_double_quantize,
    check_dropout,
    check_quantize,
    encoder_arguments,
    operands_on,
)

SIZES = (16, *[size for size in BLOCK_SIZES if size > 16])
# Around a byte, a block, a program's 4096 elements; all of them with blocks of 64.
NUMELS = (0, 1, 2, 3, 63, 65, 4095, 4097, 9001)
SOME_NUMELS = (1, 65, 4097)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", SIZES)
def test_quantize_equals_reference(
    device: torch.device, block_size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(block_size)
    for numel in NUMELS if block_size == 64 else SOME_NUMELS:
        weight = torch.randn(numel, generator=generator).to(dtype)
        check_quantize(device, weight, CODEBOOKS["nf4"], block_size)


# Every table in fp32, two of them in the other dtypes.
TABLES = [("nf4", torch.float16), ("unsorted", torch.bfloat16)]
TABLES += [(name, torch.float32) for name in CODEBOOKS]
TABLES += [(name, torch.float32) for name in list_formats() if name not in CODEBOOKS]


@pytest.mark.parametrize(("name", "dtype"), TABLES, ids=str)
def test_quantize_takes_any_table(device: torch.device, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    codebook = CODEBOOKS[name] if name in CODEBOOKS else get_format(name).codebook
    check_quantize(device, torch.randn(1023).to(dtype), codebook, 64)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "one_sided"])
def test_quantize_is_exact_on_and_around_boundaries(device: torch.device, name: str) -> None:
    boundaries = encoder_arguments(CODEBOOKS[name])[0]
    infinity = torch.full_like(boundaries, math.inf)
    around = [boundaries, boundaries.nextafter(infinity), boundaries.nextafter(-infinity)]
    weight = torch.cat([torch.ones(1), torch.cat(around).clamp(-1, 1), torch.zeros(1)])
    check_quantize(device, weight, CODEBOOKS[name], 64)
    # Divided, and multiplied by the rounded reciprocal, differ in the last bit here and there.
    scales = 1.0 + torch.rand(1000, generator=torch.Generator().manual_seed(2))
    weight = torch.zeros(len(scales), 64)
    weight[:, 0] = scales
    weight[:, 1 : 1 + len(boundaries)] = boundaries * scales[:, None]
    check_quantize(device, weight, CODEBOOKS[name], 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_of_special_blocks(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    smallest = torch.finfo(dtype).smallest_normal
    for codebook in (CODEBOOKS["nf4"], CODEBOOKS["unsorted"]):
        zeros = torch.zeros(333, dtype=dtype)
        zeros[::2] = -0.0
        check_quantize(device, zeros, codebook, 32)
        for position, value in ((0, math.nan), (64, math.inf), (330, -math.inf)):
            weight = torch.randn(331).to(dtype)
            weight[position] = value
            check_quantize(device, weight, codebook, 64)
        for scale in (smallest, smallest / 4, smallest / 64):
            check_quantize(device, (torch.randn(640).double() * scale).to(dtype), codebook, 64)


def test_quantize_of_extreme_magnitudes(device: torch.device) -> None:
    torch.manual_seed(5)
    for exponent in (-148, -127, -126, 100, 125):
        weight = torch.randn(200).clamp(-4, 4) * 2.0**exponent
        check_quantize(device, weight, CODEBOOKS["nf4"], 32)


def test_quantize_reads_any_layout(device: torch.device) -> None:
    torch.manual_seed(6)
    wide = torch.randn(50, 70)
    for weight in (wide.t(), wide[:, 3:40], wide[::2], wide.expand(2, 50, 70), wide[0, 5]):
        check_quantize(device, weight, CODEBOOKS["nf4"], 32)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("name", ["nf4", "fp4", "two"])
def test_quantize_against_decoded_scales(device: torch.device, name: str, block_size: int) -> None:
    torch.manual_seed(7)
    for numel in (1, 63, 4097, 9000):
        scales = torch.randn(n_blocks(numel, block_size)) * 3
        scales[::5], scales[1::7], scales[2::11] = 0.0, math.nan, math.inf
        weight = torch.randn(numel).bfloat16()
        check_quantize(device, weight, CODEBOOKS[name], block_size, scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("block_size", SIZES)
def test_dequantize_equals_reference(
    device: torch.device, block_size: int, scales: str, dtype: torch.dtype
) -> None:
    for numel in NUMELS if block_size == 64 else SOME_NUMELS:
        check_dequantize(device, random_weight((1, numel), block_size, scales), dtype)


@pytest.mark.parametrize(("name", "dtype"), TABLES, ids=str)
def test_dequantize_of_every_byte_and_edge_scale(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    smallest = torch.finfo(torch.float32).smallest_normal
    edges = [0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-9, 65504.0, 65519.9, 65520.0, 1e38, 3.4e38]
    edges += [2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, smallest, smallest / 2, 2.0**-149]
    edges += [math.inf, -math.inf, math.nan]
    absmax = torch.tensor(edges, dtype=torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(edges))
    table = (CODEBOOKS[name] if name in CODEBOOKS else get_format(name).codebook).table()
    operands = WeightOperands(
        codes, absmax, None, None, None, table, None, (len(edges), 512), 512, 256
    )
    check_dequantize(device, operands, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_rounds_to_nearest_even(device: torch.device, dtype: torch.dtype) -> None:
    ties = torch.tensor([1 + (2 * i + 1) * 2.0**-9 for i in range(8)] * 2)
    halves = torch.tensor([1 + (2 * i + 1) * 2.0**-12 for i in range(8)] * 2)
    for table in (ties, halves):
        for scales in SCALES:
            check_dequantize(
                device, random_weight((64, 64), 32, scales)._replace(codebook=table), dtype
            )


def test_dequantize_decodes_scales_with_two_roundings(device: torch.device) -> None:
    operands = random_weight((2048, 64), 64, "nested")
    assert operands.scale_codes is not None and operands.scale_absmax is not None
    assert operands.scale_offset is not None
    values = dynamic8_table()[operands.scale_codes.long()]
    per_block = operands.scale_absmax.repeat_interleave(256)
    fused = (values.double() * per_block.double() + operands.scale_offset.double()).float()
    assert (fused != values * per_block + operands.scale_offset).sum() > 50, "operands must tell"
    check_dequantize(device, operands, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", [*RAGGED_WEIGHTS, (5, 4160)], ids=str)
def test_dequantize_into_rows_that_are_apart(
    device: torch.device, shape: tuple[int, int], scales: str, dtype: torch.dtype
) -> None:
    rows, cols = shape
    operands = random_weight(shape, 32, scales)
    # fp16 is addressed as bf16 is.
    layouts = ((cols, 1), (cols + 7, 3), (cols + 64, 64))
    for pitch, offset in layouts if dtype != torch.float16 else layouts[1:2]:
        backing = torch.full((offset + rows * pitch + 8,), 7.0, dtype=dtype, device=device)
        out = backing[offset : offset + rows * pitch].view(rows, pitch)[:, :cols]
        check_dequantize(device, operands, dtype, out)
        out.fill_(7.0)
        assert (backing == 7.0).all(), "something beside the rows was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_into_other_layouts(device: torch.device, dtype: torch.dtype) -> None:
    operands = random_weight((48, 96))
    transposed = torch.empty(96, 48, dtype=dtype, device=device).t()
    strided = torch.empty(48, 192, dtype=dtype, device=device)[:, ::2]
    for out in (transposed, strided):
        check_dequantize(device, operands, dtype, out)
    cube = torch.empty(4, 12, 100, dtype=dtype, device=device)[:, :, :96]
    dequantize_triton(operands_on(device, operands), (4, 12, 96), dtype, cube)
    expected = dequantize_reference(operands, (48, 96), dtype)
    assert_bitwise_equal(cube.cpu(), expected.reshape(4, 12, 96))


@pytest.mark.parametrize("scale_block_size", [32, 256, 4096])
def test_double_quantize_equals_reference(device: torch.device, scale_block_size: int) -> None:
    generator = torch.Generator().manual_seed(scale_block_size)
    for count in (0, 1, 257, 4097) if scale_block_size == 256 else (257,):
        absmax = torch.randn(count, generator=generator).abs() + 0.5
        check_double_quantize(device, absmax, scale_block_size)


def test_double_quantize_is_exact_on_and_around_midpoints(device: torch.device) -> None:
    table = dynamic8_table()
    midpoints = (table[:-1] + table[1:]) * 0.5
    above = midpoints.nextafter(torch.full_like(midpoints, math.inf))
    below = midpoints.nextafter(torch.full_like(midpoints, -math.inf))
    values = torch.cat([midpoints, above, below])
    check_double_quantize(device, torch.cat([values, -values, torch.tensor([1.0, -1.0])]), 4096)


def test_double_quantize_sums_exactly(device: torch.device) -> None:
    # Plain fp64 accumulation loses the small terms to the large ones, which then cancel.
    absmax = torch.full((5_001,), 2.0**-20)
    absmax[0], absmax[-1] = 2.0**40, -(2.0**40)
    assert float(absmax.double().cumsum(0)[-1]) == 0.0, "the numbers must tell"
    check_double_quantize(device, absmax)
    generator = torch.Generator().manual_seed(0)
    for exponent, count in ((5, 600), (25, 900)):
        spread = (torch.randn(count, generator=generator) * exponent).double().exp2().float()
        check_double_quantize(device, spread)
        signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
        check_double_quantize(device, spread * signs)
    tiny, top = 2.0**-149, torch.finfo(torch.float32).max
    for values in ([tiny] * 3, [top] * 5, [top, -top, tiny], [1.0, 2.0**-53, 2.0**-80], [-1.0]):
        check_double_quantize(device, torch.tensor(values))


def test_double_quantize_rounds_the_sum_and_the_quotient_in_fp64(device: torch.device) -> None:
    # 1 + 2^-24 is half way between two fp32, and 2^-53 half way from it to the next fp64: which of
    # them the mean becomes, the last of the four decides, however small.
    for last in (2.0**-90, 0.0, -(2.0**-149)):
        check_double_quantize(device, torch.tensor([1.0, 2.0**-24, 2.0**-53, last]))
    check_double_quantize(device, torch.tensor([-1.0, -(2.0**-24), -(2.0**-53), -(2.0**-90)]))
    for third in (2.0**-53, 3 * 2.0**-53, 2.0**-54):
        check_double_quantize(device, torch.tensor([1.0, third, 2.0**-25, 0.0]))
        check_double_quantize(device, torch.tensor([3.0, third, 2.0**-23]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_double_quantize_of_a_scale_that_is_not_finite(device: torch.device, bad: float) -> None:
    absmax = torch.rand(600)
    absmax[300] = bad
    check_double_quantize(device, absmax)


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 12345, -(2**63)])
def test_dropout_equals_reference(device: torch.device, seed: int) -> None:
    torch.manual_seed(8)
    for dtype in DTYPES:
        for numel, dropout_p in ((1, 0.5), (3, 0.1), (1025, 0.9), (5000, 0.4999)):
            x = torch.randn(numel).to(dtype)
            check_dropout(device, x, dropout_p, torch.tensor([seed]))


def test_dropout_of_nothing_and_of_everything(device: torch.device) -> None:
    x, seed = torch.randn(5, 7, device=device), torch.tensor([1], device=device)
    assert dropout_triton(x, 0.0, seed) is x
    assert dropout_triton(x, 0.5, None) is x
    assert not dropout_triton(x, 1.0, seed).any()
    x[2] = math.nan
    assert not dropout_triton(x, 1.0, seed).any()
    check_dropout(device, x.cpu(), 0.5, seed.cpu())
