"""dequantize_many: whatever shares a launch, every weight is the reference's, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora_kernels.backends.triton import dequantize
from qlora_kernels.backends.triton.dequantize import (
    MOST_WEIGHTS,
    dequantize_many_launch,
    dequantize_many_triton,
)
from qlora_kernels.backends.triton.launch import Launch
from qlora_kernels.formats import list_formats
from qlora_kernels.formats.quantized_weight import WeightOperands
from tests.problems import DTYPES, SCALES, random_weight
from tests.triton.checks import CODEBOOKS, check_dequantize_many, operands_on

# Larger and smaller than a program, odd, of one column, empty.
SHAPES = ((40, 64), (130, 96), (3, 4160), (7, 9), (1, 1), (0, 64), (5, 1), (64, 128))


def weights(scales: str, block_size: int = 64) -> list[WeightOperands]:
    """One of each shape, of every format in turn."""
    names = list_formats()
    return [
        random_weight(shape, block_size, scales, names[i % len(names)], seed=i)
        for i, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", SCALES)
def test_every_weight_of_a_launch_is_the_references(
    device: torch.device, scales: str, dtype: torch.dtype
) -> None:
    check_dequantize_many(device, weights(scales, 32 if dtype == torch.float32 else 4096), dtype)
    for count in range(1, len(SHAPES), 2):
        check_dequantize_many(device, weights(scales)[-count:], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_stored_differently(device: torch.device, dtype: torch.dtype) -> None:
    mixed = [
        random_weight((24, 128), block_size, scales, name, seed=block_size)
        for block_size, scales, name in itertools.product((32, 64), SCALES, ("nf4", "int4"))
    ]
    mixed.append(random_weight((10, 64), 64, "nested", CODEBOOKS["two"])._replace(shape=(5, 128)))
    check_dequantize_many(device, mixed, dtype)


def test_offsets_differ_between_weights(device: torch.device) -> None:
    pair = []
    for offset in (0.05, -0.7):
        one = random_weight((24, 128), 64, "nested")
        pair.append(one._replace(scale_offset=torch.full((1,), offset)))
    check_dequantize_many(device, pair, torch.float32)


@pytest.mark.parametrize(
    ("scales", "dtype"), [("nested", torch.bfloat16), ("absmax", torch.float32)], ids=str
)
def test_rows_that_are_apart(device: torch.device, scales: str, dtype: torch.dtype) -> None:
    group = weights(scales, 32)
    backings, outs = [], []
    for i, one in enumerate(group):
        rows, cols = one.shape
        # A pitch that keeps rows at 16-byte boundaries, one that does not, and none.
        pitch, offset = ((cols + 64, 64), (cols + 7, 3), (cols, 0))[i % 3]
        backing = torch.full((offset + rows * pitch + 8,), 7.0, dtype=dtype, device=device)
        backings.append(backing)
        outs.append(backing[offset : offset + rows * pitch].view(rows, pitch)[:, :cols])
    outs[3] = torch.empty(9, 7, dtype=dtype, device=device).t()
    given = [out if i != 5 else None for i, out in enumerate(outs)]
    check_dequantize_many(device, group, dtype, given)
    for i, (out, backing) in enumerate(zip(outs, backings, strict=True)):
        if i not in (3, 5):
            out.fill_(7.0)
        assert (backing == 7.0).all(), f"something beside the rows of weight {i} was written"


def test_one_launch_takes_all_that_it_can(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launches.append(launch))
    layer = [operands_on(device, random_weight((64, 64), 64, "nested")) for _ in range(7)]
    for count, wanted in ((1, 1), (7, 1), (0, 0)):
        launches.clear()
        dequantize_many_triton(layer[:count], torch.bfloat16, [None] * count)
        assert len(launches) == wanted
    launches.clear()
    dequantize_many_triton(layer * 3, torch.bfloat16, [None] * 21)
    assert [launch.arguments["COUNT"] for launch in launches] == [8, 8, 5] and MOST_WEIGHTS == 8


def test_a_launch_says_whether_it_is_aligned(device: torch.device) -> None:
    one = operands_on(device, random_weight((8, 64), 64, "nested"))

    def aligned(out: torch.Tensor) -> bool:
        plain = torch.empty(8, 64, dtype=out.dtype, device=device)
        launch = dequantize_many_launch([(one, plain), (one, out)])
        return bool(launch.arguments["ALIGNED"])

    wide = torch.empty(9, 96, dtype=torch.bfloat16, device=device)
    assert aligned(wide[:8, :64]) and aligned(wide[:8, 8:72])
    assert not aligned(wide[:8, 1:65])
    assert not aligned(torch.empty(8, 72, dtype=torch.bfloat16, device=device)[:, :64])


def test_programs_are_shared_out_in_order(device: torch.device) -> None:
    group = [
        (operands_on(device, one), torch.empty(1, one.shape[0] * one.shape[1], device=device))
        for one in (random_weight((72, 128)), random_weight((1, 64)), random_weight((32, 160)))
    ]
    launch = dequantize_many_launch(group)
    tile = launch.arguments["TILE_BLOCKS"] * 64
    assert tile == dequantize._MANY_TILE
    assert launch.arguments["first_programs"] == (0, 2, 3) and launch.grid == (4,)
