"""What the codecs must do on every runner, emulated or on a GPU: equal the reference exactly."""

from __future__ import annotations

import math

import torch

import qlora_kernels as qlk
from qlora_kernels.formats import Codebook, get_format, list_formats
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.operands import StoredOperands, kernel_operands
from qlora_kernels.reference import (
    dequantize_reference,
    double_quantize_reference,
    quantize_reference,
)
from qlora_kernels.testing import shapes as common
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.shapes import CODEC_NUMELS, RAGGED_WEIGHTS
from tests import cuda_codecs
from tests.emulation.cuda.runner import Runner
from tests.problems import DTYPES, SCALES, random_weight

CODEBOOKS = {name: get_format(name).codebook for name in list_formats()} | {
    "two": Codebook("two", values=[-1.0, 1.0]),
    "unsorted": Codebook("unsorted", values=[0.9, -0.2, 0.4, -1.0, 0.1]),
    "one_sided": Codebook("one_sided", values=[0.1 * i for i in range(1, 17)]),
}
BLOCK_SIZES = tuple(sorted({16, *common.BLOCK_SIZES}))
# Around a lane, a run, a tile and a launch of the kernels.
NUMELS = (*CODEC_NUMELS[1:-2], 8191, 8192, 8200, 24_576 * 2 + 1)


def _encoder(codebook: Codebook, decoded: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    encoder = codebook.exact_encoder if decoded else codebook.encoder
    dtype = torch.float64 if decoded else torch.float32
    ranks = torch.tensor(encoder.rank_codes, dtype=torch.uint8)
    return torch.tensor(encoder.boundaries, dtype=dtype), ranks, encoder.zero_code


def _check_quantize(
    runner: Runner,
    seed: int,
    weight: torch.Tensor,
    codebook: Codebook,
    block_size: int,
    scales: torch.Tensor | None = None,
    misaligned: bool = False,
    zero_code: int | None = None,
) -> None:
    boundaries, rank_codes, own_zero_code = _encoder(codebook, scales is not None)
    zero_code = own_zero_code if zero_code is None else zero_code
    arguments = (weight, boundaries, rank_codes, zero_code, block_size, scales)
    codes, absmax = cuda_codecs.quantize(runner, seed, *arguments, misaligned=misaligned)
    expected_codes, expected_absmax = quantize_reference(*arguments)
    what = f"{weight.numel()} elements of {weight.dtype}, blocks of {block_size}, seed {seed}"
    assert_bitwise_equal(absmax, expected_absmax, f"absmax of {what}")
    assert_bitwise_equal(codes, expected_codes, f"codes of {what}")


def check_quantize_sizes(runner: Runner, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, numel in enumerate(NUMELS):
        for j in range(2):
            weight = torch.randn(numel, generator=generator).to(DTYPES[(i + j + seed) % 3])
            size = BLOCK_SIZES[(i + 3 * j + seed) % len(BLOCK_SIZES)]
            _check_quantize(runner, seed, weight, CODEBOOKS["nf4"], size, misaligned=bool(j))


def check_quantize_block_sizes(runner: Runner, seed: int) -> None:
    weight = torch.randn(9000, generator=torch.Generator().manual_seed(seed))
    for i, block_size in enumerate(BLOCK_SIZES):
        values = weight.to(DTYPES[(i + seed) % 3])
        _check_quantize(runner, seed, values, CODEBOOKS["nf4"], block_size)


def check_quantize_tables(runner: Runner, seed: int) -> None:
    torch.manual_seed(seed)
    for i, codebook in enumerate(CODEBOOKS.values()):
        _check_quantize(runner, seed, torch.randn(1023).to(DTYPES[i % 3]), codebook, 64)
        boundaries = _encoder(codebook, False)[0]
        infinity = torch.full_like(boundaries, math.inf)
        around = [boundaries, boundaries.nextafter(infinity), boundaries.nextafter(-infinity)]
        weight = torch.cat([torch.ones(1), *around, torch.zeros(1), -torch.zeros(1)])
        _check_quantize(runner, seed, weight.clamp(-1, 1), codebook, 64)
    # The pad of an odd length is the caller's code of zero, whatever a zero would be encoded as.
    for zero_code in (3, 12):
        _check_quantize(runner, seed, torch.randn(77), CODEBOOKS["nf4"], 64, zero_code=zero_code)
    # Divided and multiplied by the rounded reciprocal differ in the last bit.
    scales = 1.0 + torch.rand(500)
    weight = torch.zeros(500, 64)
    weight[:, 0] = scales
    weight[:, 1:16] = _encoder(CODEBOOKS["nf4"], False)[0] * scales[:, None]
    _check_quantize(runner, seed, weight, CODEBOOKS["nf4"], 64)


def check_quantize_edges(runner: Runner, seed: int) -> None:
    torch.manual_seed(seed)
    zeros = torch.zeros(333)
    zeros[::2] = -0.0
    for dtype in DTYPES:
        _check_quantize(runner, seed, zeros.to(dtype), CODEBOOKS["unsorted"], 32)
        for value in (math.nan, math.inf, -math.inf):
            weight = torch.randn(1331).to(dtype)
            weight[[0, 100, 319, 1330]] = value
            _check_quantize(runner, seed, weight, CODEBOOKS["nf4"], 64)
        smallest = torch.finfo(dtype).smallest_normal
        for scale in (smallest, smallest / 64):
            denormals = (torch.randn(640).double() * scale).to(dtype)
            assert (denormals != 0).any()
            _check_quantize(runner, seed, denormals, CODEBOOKS["nf4"], 64)


def check_quantize_decoded(runner: Runner, seed: int) -> None:
    torch.manual_seed(seed)
    for i, name in enumerate(("nf4", "fp4", "unsorted", "two")):
        weight = torch.randn(2111).to(DTYPES[i % 3])
        scales = torch.randn(-(-2111 // 64))
        scales[3], scales[5], scales[7] = 0.0, math.inf, math.nan
        weight[64 * 9] = math.nan
        _check_quantize(runner, seed, weight, CODEBOOKS[name], 64, scales)
    # Exact ties, which go to the lower value whatever the scale's sign is.
    midpoints = _encoder(CODEBOOKS["nf4"], True)[0]
    scales = torch.tensor([0.75, -0.75])
    ties = (midpoints[None, :] * scales.double()[:, None]).float()
    weight = torch.zeros(2, 32)
    weight[:, :15] = ties
    _check_quantize(runner, seed, weight, CODEBOOKS["nf4"], 32, scales)


def _check_double_quantize(
    runner: Runner,
    seed: int,
    absmax: torch.Tensor,
    scale_block_size: int = 256,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    table = dynamic8_table() if table is None else table
    got = cuda_codecs.double_quantize(runner, seed, absmax, table, scale_block_size)
    expected = double_quantize_reference(absmax, table, scale_block_size)
    for name, mine, theirs in zip(("codes", "absmax", "offset"), got, expected, strict=True):
        assert_bitwise_equal(mine, theirs, f"scale_{name} of {absmax.numel()}, seed {seed}")
    return got[2]


def check_double_quantize(runner: Runner, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, count in enumerate((1, 2, 7, 255, 256, 257, 2049, 8193)):
        size = (256, 64, 4096, 100)[(i + seed) % 4]
        _check_double_quantize(
            runner, seed, torch.randn(count, generator=generator).abs() + 0.5, size
        )
    _check_double_quantize(runner, seed, torch.rand(40), 1)
    _check_double_quantize(runner, seed, torch.rand(2000), 256, torch.linspace(-1, 1, 256))
    _check_double_quantize(runner, seed, torch.full((300,), 3.25e-7))
    _check_double_quantize(runner, seed, torch.zeros(300))
    table = dynamic8_table()
    midpoints = (table[:-1] + table[1:]) * 0.5
    infinity = torch.full_like(midpoints, math.inf)
    around = torch.cat([midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity)])
    values = torch.cat([around, -around, torch.tensor([1.0, -1.0])])
    assert float(_check_double_quantize(runner, seed, values, 4096)) == 0.0


def check_double_quantize_sums_exactly(runner: Runner, seed: int) -> None:
    # Plain fp64 accumulation loses the small terms to the large ones, which then cancel.
    absmax = torch.full((10_001,), 2.0**-20)
    absmax[0], absmax[-1] = 2.0**40, -(2.0**40)
    assert float(absmax.double().cumsum(0)[-1]) == 0.0, "the numbers must tell"
    offset = _check_double_quantize(runner, seed, absmax)
    assert float(offset) == torch.tensor(9_999 * 2.0**-20 / 10_001).item()
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(torch.float32).max
    for exponent in (1, 5, 20, 60):
        spread = (torch.randn(3000, generator=generator) * exponent).clamp(-148, 127)
        signs = torch.randn(3000, generator=generator).sign()
        _check_double_quantize(runner, seed, spread.double().exp2().float())
        _check_double_quantize(runner, seed, (spread.double().exp2() * signs).float())
    # Sums on and next to a tie of fp64's last bit that decides a tie of fp32's: with four scales
    # the mean keeps it. And sums at both ends of fp32.
    tie = torch.tensor([2.0**60, 2.0**36, 2.0**7])
    for extra in ([], [2.0**-100], [-(2.0**-100)], [2.0**8], [-(2.0**8), 2.0**-149]):
        _check_double_quantize(runner, seed, torch.cat([tie, torch.tensor(extra)]))
        _check_double_quantize(runner, seed, -torch.cat([tie, torch.tensor(extra)]))
    _check_double_quantize(runner, seed, torch.full((1000,), largest))
    _check_double_quantize(runner, seed, torch.full((999,), 2.0**-149))
    _check_double_quantize(runner, seed, torch.rand(1000, generator=generator) * 2.0**-130)


def check_double_quantize_not_finite(runner: Runner, seed: int) -> None:
    for value in (math.nan, math.inf):
        absmax = torch.rand(600, generator=torch.Generator().manual_seed(seed))
        absmax[300] = value
        _check_double_quantize(runner, seed, absmax)


def _check_dequantize(
    runner: Runner, seed: int, weights: list, dtype: torch.dtype, **layout: int
) -> None:
    got = cuda_codecs.dequantize(runner, seed, weights, dtype, **layout)
    for i, (mine, weight) in enumerate(zip(got, weights, strict=True)):
        expected = dequantize_reference(weight, weight.shape, dtype)
        assert_bitwise_equal(mine, expected, f"{weight.shape} {dtype} {layout} [{i}], seed {seed}")


def check_dequantize_sizes(runner: Runner, seed: int) -> None:
    for i, numel in enumerate(NUMELS):
        dtype, size = DTYPES[(i + seed) % 3], BLOCK_SIZES[(i + seed) % len(BLOCK_SIZES)]
        weight = random_weight((1, numel), size, SCALES[(i + seed // 3) % 2], seed=seed)
        _check_dequantize(runner, seed, [weight], dtype)


def check_dequantize_every_byte(runner: Runner, seed: int) -> None:
    # Each block holds all 256 bytes; the scales reach every rounding case of the output dtypes.
    smallest = torch.finfo(torch.float32).smallest_normal
    edges = [0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-9, 65504.0, 65519.9, 65520.0, 1e38, 3.4e38]
    edges += [2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, smallest, smallest / 2, 2.0**-149]
    edges += [math.inf, -math.inf, math.nan]
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(edges))
    absmax = torch.tensor(edges)
    for i, name in enumerate(("nf4", "fp4", "int4")):
        weight = random_weight((len(edges), 512), 512, codebook=name)
        weight = weight._replace(codes=codes, absmax=absmax)
        _check_dequantize(runner, seed, [weight], DTYPES[(i + seed) % 3])


def check_dequantize_formats(runner: Runner, seed: int) -> None:
    # What the kernel sees of each: shifts are added around it, tables per row looked up by torch.
    weights = []
    for name in list_formats():
        dense = torch.randn(12, 160, generator=torch.Generator().manual_seed(seed))
        operands = qlk.quantize(dense, name).operands()
        if isinstance(operands, StoredOperands):
            if operands.codebook.dim() == 2:
                continue
            operands = kernel_operands(operands)
        weights.append(operands)
    assert len(weights) >= len(list_formats()) - 2
    for begin in range(0, len(weights), 5):
        dtype = DTYPES[(begin // 5 + seed) % 3]
        _check_dequantize(runner, seed, weights[begin : begin + 5], dtype)


def check_dequantize_layouts(runner: Runner, seed: int) -> None:
    for i, shape in enumerate((*RAGGED_WEIGHTS, (37, 264), (9, 1024))):
        for j, scales in enumerate(SCALES):
            weight = random_weight(shape, BLOCK_SIZES[(i + j) % 4], scales, seed=i)
            dtype = DTYPES[(i + j + seed) % 3]
            for pitch in (0, 16, 3):
                _check_dequantize(runner, seed, [weight], dtype, pitch=pitch)
            _check_dequantize(runner, seed, [weight], dtype, pitch=8, out_shift=1)
            _check_dequantize(runner, seed, [weight], dtype, codes_shift=1)


def check_dequantize_scales(runner: Runner, seed: int) -> None:
    weight = random_weight((512, 64), 64, "nested", seed=3)
    assert weight.scale_codes is not None
    assert weight.scale_absmax is not None
    assert weight.scale_offset is not None
    product = dynamic8_table()[weight.scale_codes.long()].double()
    product = product * weight.scale_absmax.repeat_interleave(256).double()
    fused = (product + weight.scale_offset.double()).float()
    assert (fused != product.float() + weight.scale_offset).sum() > 10, "must tell the two apart"
    _check_dequantize(runner, seed, [weight], torch.float32)
    for size in (1, 3, 64, 100, 1000):
        blocks = weight.scale_codes.numel()
        absmax = torch.rand(-(-blocks // size), generator=torch.Generator().manual_seed(size))
        other = weight._replace(scale_absmax=absmax, scale_block_size=size)
        _check_dequantize(runner, seed, [other], DTYPES[(size + seed) % 3])


def check_dequantize_many_at_once(runner: Runner, seed: int) -> None:
    # More tiles than blocks: a block comes to tiles of several weights.
    shapes = ((64, 96), (1, 1), (33, 129), (0, 5), (128, 200), (9, 4096), (8, 64), (7, 63))
    # As many as a launch takes.
    shapes = (*shapes, (3, 40), (1, 8193), (5, 5), (0, 0), (16, 16), (2, 31), (64, 64), (1, 33))
    names = ("nf4", "fp4", "int4")
    for dtype in DTYPES:
        weights = [
            random_weight(shape, BLOCK_SIZES[i % 4], SCALES[i % 2], names[i % 3], seed=i)
            for i, shape in enumerate(shapes)
        ]
        _check_dequantize(runner, seed, weights, dtype)
        _check_dequantize(runner, seed, weights[4:6], dtype, pitch=8)


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}
