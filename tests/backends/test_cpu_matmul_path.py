"""Which way a CPU matmul goes, and the panels of the way through torch's GEMM."""

from __future__ import annotations

import threading

import pytest
import torch

from qlora_kernels.backends.cpu import panels
from qlora_kernels.backends.cpu.common import ISA_NAMES, weight_arguments
from qlora_kernels.backends.cpu.matmul_path import choose_path
from qlora_kernels.backends.cpu.panels import PANEL_BYTES, backward_by_panels, matmul_by_panels
from qlora_kernels.reference import dequantize_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.problems import DTYPES, SCALES, random_weight
from tests.tolerances import assert_matmul, assert_matmul_backward

LEVELS = range(len(ISA_NAMES))
AMX = ISA_NAMES.index("amx")


@pytest.mark.parametrize("level", LEVELS, ids=ISA_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_few_tokens_are_fused_and_many_are_not(
    level: int, dtype: torch.dtype, backward: bool
) -> None:
    paths = [
        choose_path(tokens, 4096, 4096, dtype, level, False, backward) for tokens in range(600)
    ]
    assert paths[0] == "dot"
    if level == AMX and dtype == torch.bfloat16:
        # A grad_x of one token is tiles already.
        first = paths.index("tiles")
        assert first == 1 if backward else 1 < first < 16
        assert set(paths[:first]) == {"dot"} and set(paths[first:]) == {"tiles"}
        return
    first = paths.index("panels")
    assert 1 < first <= 65
    assert set(paths[:first]) == {"dot"} and set(paths[first:]) == {"panels"}


@pytest.mark.parametrize("level", LEVELS, ids=ISA_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_takes_one_path_for_every_number_of_tokens(
    level: int, dtype: torch.dtype
) -> None:
    paths = {choose_path(tokens, 64, 64, dtype, level, True) for tokens in range(1, 600)}
    assert len(paths) == 1 and "panels" not in paths


@pytest.mark.parametrize("level", LEVELS, ids=ISA_NAMES)
@pytest.mark.parametrize("invariant", [False, True])
def test_an_empty_weight_needs_neither_tiles_nor_panels(level: int, invariant: bool) -> None:
    for shape in ((0, 64), (64, 0), (0, 0)):
        for dtype in DTYPES:
            for tokens in (0, 1, 100):
                assert choose_path(tokens, *shape, dtype, level, invariant) == "dot"


def test_the_levels_of_this_machine_reach_every_path_they_have(isa: int) -> None:
    # The shapes of the other tests: without this they might never take a path.
    taken = {choose_path(t, 65, 257, d, isa) for t in (1, 2, 16, 70) for d in DTYPES}
    assert taken == {"dot", "panels"} | ({"tiles"} if isa == AMX else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scales", SCALES)
def test_decode_panel_is_a_part_of_the_dense_weight(
    isa: int, scales: str, dtype: torch.dtype
) -> None:
    for shape, block_size in (((37, 95), 32), ((40, 256), 64), ((5, 9000), 4096)):
        rows, cols = shape
        weight = random_weight(shape, block_size, scales)
        dense = dequantize_reference(weight, shape, dtype)
        for row, col, height, width in (
            (0, 0, rows, cols),
            (1, 0, rows - 1, cols),
            (0, 1, rows, cols - 1),
            (2, 33, 3, 31),
            (rows - 1, cols - 1, 1, 1),
            (1, 64, 2, 0),
        ):
            out = torch.full((height, width), 7.0, dtype=dtype)
            arguments = weight_arguments(weight)
            torch.ops.qlora_kernels_cpu.decode_panel.default(*arguments, row, col, out, isa)
            assert_bitwise_equal(out, dense[row : row + height, col : col + width])


def test_decode_panel_rejects_what_would_corrupt_memory(isa: int) -> None:
    arguments = weight_arguments(random_weight((8, 64)))
    decode = torch.ops.qlora_kernels_cpu.decode_panel.default
    for row, col in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        with pytest.raises(RuntimeError, match=r"out must lie in \[8, 64\]"):
            decode(*arguments, row, col, torch.empty(8, 64), isa)
    with pytest.raises(RuntimeError, match="out must be a contiguous 2-D CPU tensor"):
        decode(*arguments, 0, 0, torch.empty(64, 8).t(), isa)
    with pytest.raises(RuntimeError, match="does not support"):
        decode(*arguments, 0, 0, torch.empty(8, 64, dtype=torch.float16), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [1, 5000, 20_000, 70_000, PANEL_BYTES])
def test_panels_of_any_size_give_the_product(
    isa: int,
    limit: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
) -> None:
    monkeypatch.setattr(panels, "PANEL_BYTES", limit)
    used: list[torch.Tensor] = []
    scratch = panels._panel_scratch

    def watched(rows: int, cols: int, panel_dtype: torch.dtype) -> torch.Tensor:
        used.append(scratch(rows, cols, panel_dtype))
        return used[-1]

    monkeypatch.setattr(panels, "_panel_scratch", watched)
    for shape in ((65, 257), (128, 96), (3, 40)):
        rows, cols = shape
        weight = random_weight(shape, 32, "nested")
        x, grad_y = torch.randn(30, cols).to(dtype), torch.randn(30, rows).to(dtype)
        bias = torch.randn(rows)
        assert_matmul(matmul_by_panels(isa, x, weight, bias), x, weight, bias)
        assert_matmul_backward(backward_by_panels(isa, grad_y, weight), grad_y, weight)
        # 16 rows, or columns, are taken together even where they are larger than the limit.
        assert max(p.nbytes for p in used) <= max(limit, 16 * max(shape) * used[0].itemsize)
        assert sum(p.numel() for p in used) == 2 * rows * cols
        used.clear()


def test_the_scratch_of_panels_is_bounded_and_reused(
    isa: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not what a wider weight of another test has left.
    monkeypatch.setattr(panels, "_scratch", threading.local())
    rows = PANEL_BYTES // 8192 + 100
    weight = random_weight((rows, 2048), 64)
    x = torch.randn(30, 2048)
    y = matmul_by_panels(isa, x, weight)
    buffer = panels._scratch.buffers[torch.float32]
    assert buffer.nbytes <= PANEL_BYTES < rows * 8192
    assert_bitwise_equal(matmul_by_panels(isa, x, weight), y)
    assert panels._scratch.buffers[torch.float32] is buffer
