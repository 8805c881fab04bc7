"""dequantize on the CPU equals the reference bit for bit, on every path and into every layout."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_kernels.backends.cpu.dequantize import dequantize_cpu
from qlora_kernels.formats import get_format
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.packing import n_blocks, packed_size
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import dequantize_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.shapes import BLOCK_SIZES, CODEC_NUMELS, RAGGED_WEIGHTS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = ("absmax", "nested")


def random_operands(
    shape: tuple[int, ...],
    block_size: int = 64,
    scales: str = "absmax",
    *,
    codebook: torch.Tensor | None = None,
    scale_block_size: int = 256,
    seed: int = 0,
) -> WeightOperands:
    """Random codes (every byte occurs in a large weight) with positive and negative scales."""
    generator = torch.Generator().manual_seed(seed)
    numel = math.prod(shape)
    blocks = n_blocks(numel, block_size)
    codes = torch.randint(0, 256, (packed_size(numel),), dtype=torch.uint8, generator=generator)
    table = get_format("nf4").codebook.table() if codebook is None else codebook
    if scales == "absmax":
        absmax = torch.randn(blocks, generator=generator)
        return WeightOperands(
            codes, absmax, None, None, None, table, None, shape, block_size, scale_block_size
        )
    return WeightOperands(
        codes,
        None,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        torch.rand(n_blocks(blocks, scale_block_size), generator=generator) + 0.1,
        torch.randn(1, generator=generator) * 0.1,
        table,
        dynamic8_table(),
        shape,
        block_size,
        scale_block_size,
    )


def check(isa: int, operands: WeightOperands, dtype: torch.dtype) -> None:
    got = dequantize_cpu(isa, operands, operands.shape, dtype)
    assert_bitwise_equal(got, dequantize_reference(operands, operands.shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_equals_reference(
    isa: int, block_size: int, scales: str, dtype: torch.dtype
) -> None:
    for numel in CODEC_NUMELS:
        check(isa, random_operands((numel,), block_size, scales), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
def test_dequantize_of_every_byte_and_edge_scale(isa: int, name: str, dtype: torch.dtype) -> None:
    # Each block holds all 256 bytes; the scales reach every rounding case of the output dtypes.
    smallest = torch.finfo(torch.float32).smallest_normal
    edges = [0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-9, 65504.0, 65519.9, 65520.0, 1e38, 3.4e38]
    edges += [2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, smallest, smallest / 2, 2.0**-149]
    edges += [math.inf, -math.inf, math.nan]
    absmax = torch.tensor(edges, dtype=torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(edges))
    table = get_format(name).codebook.table()
    operands = WeightOperands(
        codes, absmax, None, None, None, table, None, (len(edges), 512), 512, 256
    )
    check(isa, operands, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_rounds_to_nearest_even(isa: int, dtype: torch.dtype) -> None:
    # Values midway between neighbours of bf16 (2^-7 apart from 1 on) and of fp16 (2^-10 apart), at
    # scales that are powers of two; and products with random low bits.
    torch.manual_seed(1)
    for spacing in (2.0**-7, 2.0**-10):
        ties = torch.tensor([1 + (i + 0.5) * spacing for i in range(16)])
        operands = random_operands((64, 64), codebook=ties)
        assert operands.absmax is not None
        powers = torch.sign(operands.absmax) * 2.0 ** torch.arange(64).remainder(12)
        check(isa, operands._replace(absmax=powers), dtype)
    random = torch.randn(16)
    check(isa, random_operands((64, 64), codebook=random), dtype)
    check(isa, random_operands((64, 64), 32, "nested", codebook=random), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_keeps_unused_codes_nan(isa: int, dtype: torch.dtype) -> None:
    codebook = torch.full((16,), math.nan)
    codebook[:3] = torch.tensor([-1.0, 0.0, 1.0])
    operands = random_operands((4096,), codebook=codebook)
    check(isa, operands, dtype)
    assert dequantize_cpu(isa, operands, (4096,), dtype).isnan().any()


def test_dequantize_decodes_scales_with_two_roundings(isa: int) -> None:
    # A fused multiply-add gives other scales: the operands must tell the two apart.
    operands = random_operands((4096, 64), 64, "nested", seed=3)
    assert operands.scale_codes is not None
    assert operands.scale_absmax is not None
    assert operands.scale_offset is not None
    values = dynamic8_table()[operands.scale_codes.long()]
    per_block = operands.scale_absmax.repeat_interleave(256)
    fused = (values.double() * per_block.double() + operands.scale_offset.double()).float()
    assert (fused != values * per_block + operands.scale_offset).sum() > 100
    check(isa, operands, torch.float32)


@pytest.mark.parametrize("scale_block_size", [1, 3, 64, 100, 1000])
def test_dequantize_of_other_scale_block_sizes(isa: int, scale_block_size: int) -> None:
    operands = random_operands((33, 1000), 32, "nested", scale_block_size=scale_block_size)
    check(isa, operands, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", RAGGED_WEIGHTS, ids=str)
def test_dequantize_into_rows_that_are_apart(
    isa: int, shape: tuple[int, int], scales: str, dtype: torch.dtype
) -> None:
    rows, cols = shape
    operands = random_operands(shape, 32, scales)
    expected = dequantize_reference(operands, shape, dtype)
    for pitch, offset in ((cols, 0), (cols, 1), (cols + 1, 0), (cols + 7, 3), (cols + 64, 64)):
        backing = torch.full((offset + rows * pitch + 8,), 7.0, dtype=dtype)
        out = backing[offset : offset + rows * pitch].view(rows, pitch)[:, :cols]
        result = dequantize_cpu(isa, operands, shape, dtype, out)
        assert result is out
        assert_bitwise_equal(out, expected)
        untouched = backing.clone()
        untouched[offset : offset + rows * pitch].view(rows, pitch)[:, :cols] = 7.0
        assert (untouched == 7.0).all(), "something beside the rows was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_into_other_layouts(isa: int, dtype: torch.dtype) -> None:
    shape = (48, 96)
    operands = random_operands(shape)
    expected = dequantize_reference(operands, shape, dtype)
    transposed = torch.empty(96, 48, dtype=dtype).t()
    strided = torch.empty(48, 192, dtype=dtype)[:, ::2]
    overlapping_free = torch.empty(3, 48, 96, dtype=dtype)[1]
    for out in (transposed, strided, overlapping_free):
        assert dequantize_cpu(isa, operands, shape, dtype, out) is out
        assert_bitwise_equal(out, expected)
    cube = (4, 12, 96)
    out = torch.empty(4, 12, 100, dtype=dtype)[:, :, :96]
    dequantize_cpu(isa, operands, cube, dtype, out)
    assert_bitwise_equal(out, expected.reshape(cube))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
def test_dequantize_of_large_outputs(isa: int, scales: str, dtype: torch.dtype) -> None:
    # Large enough for the stores that bypass the caches, aligned and not, fresh and given.
    shape = (1031, 2111)
    operands = random_operands(shape, 64, scales)
    expected = dequantize_reference(operands, shape, dtype)
    numel = math.prod(shape)
    assert numel * expected.element_size() > 4 << 20
    assert_bitwise_equal(dequantize_cpu(isa, operands, shape, dtype), expected)
    for offset in (0, 1, 32):
        out = torch.empty(numel + 64, dtype=dtype)[offset : offset + numel].view(shape)
        assert_bitwise_equal(dequantize_cpu(isa, operands, shape, dtype, out), expected)
    pitched = torch.empty(1031, 2176, dtype=dtype)[:, :2111]
    assert_bitwise_equal(dequantize_cpu(isa, operands, shape, dtype, pitched), expected)


def test_dequantize_of_empty_weights(isa: int) -> None:
    for shape in ((0,), (0, 64), (64, 0)):
        for scales in SCALES:
            assert dequantize_cpu(
                isa, random_operands(shape, 64, scales), shape, torch.bfloat16
            ).shape == torch.Size(shape)


@pytest.mark.parametrize("block_size", [64, 1024])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_dequantize_equals_bitsandbytes(isa: int, name: str, block_size: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(4)
    weight = torch.randn(64, 2048)
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type=name)
    operands = WeightOperands(
        packed.reshape(-1),
        state.absmax,
        None,
        None,
        None,
        get_format(name).codebook.table(),
        None,
        (64, 2048),
        block_size,
        256,
    )
    got = dequantize_cpu(isa, operands, (64, 2048), torch.float32)
    expected = functional.dequantize_4bit(packed, state)
    # + 0.0: bitsandbytes decodes FP4's code 8 to -0.0.
    assert_bitwise_equal(got + 0.0, expected + 0.0)


def test_binding_rejects_what_would_corrupt_memory(isa: int) -> None:
    operands = random_operands((8, 64))
    with pytest.raises(RuntimeError, match="codes must have 256 elements, got 255"):
        dequantize_cpu(isa, operands._replace(codes=operands.codes[1:]), (8, 64), torch.float32)
    assert operands.absmax is not None
    with pytest.raises(RuntimeError, match="absmax must have 8 elements, got 7"):
        dequantize_cpu(isa, operands._replace(absmax=operands.absmax[1:]), (8, 64), torch.float32)
    with pytest.raises(RuntimeError, match="exactly one of absmax and scale_codes"):
        dequantize_cpu(isa, operands._replace(absmax=None), (8, 64), torch.float32)
    with pytest.raises(RuntimeError, match="out must be float32, float16 or bfloat16"):
        dequantize_cpu(isa, operands, (8, 64), torch.float64)
    nested = random_operands((8, 64), 64, "nested")
    with pytest.raises(RuntimeError, match="scale_codes must come with"):
        dequantize_cpu(isa, nested._replace(scale_offset=None), (8, 64), torch.float32)
