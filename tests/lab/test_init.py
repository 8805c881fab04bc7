"""What each start of an adapter leaves of the error, and that each is best at what it minimises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kernels import dequantize, quantize
from qlora_kernels.errors import ArgumentError
from qlora_kernels.lab.cache import CellCache
from qlora_kernels.lab.init import METHODS, compare_starts
from qlora_kernels.lab.variants import Variant
from qlora_kernels.nn.initialization import loftq
from tests.lab.running import TwoLayers

NF4 = Variant.of("nf4", {})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Method -> its row, for a model whose inputs are far from white."""
    studied = skewed()
    with CellCache(tmp_path_factory.mktemp("cache")) as cache:
        rows = compare_starts(studied, [NF4], list(METHODS), 8, 16.0, cache)
    return {row["method"]: row for row in rows}


def skewed() -> TwoLayers:
    studied = TwoLayers()
    scale = torch.logspace(-1, 1, 64)
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8
    for part, x in studied.parts.items():
        studied.parts[part] = x * scale + (x * scale) @ mixing
    return studied


def test_zero_is_the_format_s_own_error(table: dict[str, dict[str, Any]]) -> None:
    studied = skewed()
    lost = total = 0.0
    for layer in studied.layers.values():
        dense = dequantize(quantize(layer.weight, NF4.format), torch.float32)
        lost += float((dense - layer.weight).norm()) ** 2
        total += float(layer.weight.norm()) ** 2
    assert table["zero"]["weight error"] == pytest.approx(math.sqrt(lost / total), rel=1e-5)


def test_errors_are_those_of_the_products(tmp_path: Path) -> None:
    """One layer and method, by the formula ‖(W − Ŵ − s·B·A)X‖ / ‖WX‖."""
    studied = skewed()
    studied.layers = {"0": studied.layers["0"]}
    weight = studied.layers["0"].weight.detach()
    begin = loftq(weight, 8, 2.0, NF4.format, steps=5)
    left = weight - dequantize(begin.qw, torch.float32) - 2.0 * begin.lora_b @ begin.lora_a

    def relative(x: torch.Tensor) -> float:
        return float((left @ x.t()).norm() / (weight @ x.t()).norm())

    with CellCache(tmp_path) as cache:
        row = compare_starts(studied, [NF4], ["loftq-5"], 8, 16.0, cache)[0]
    assert row["weight error"] == pytest.approx(float(left.norm() / weight.norm()), rel=1e-5)
    assert row["output error"] == pytest.approx(relative(studied.parts["calibration"]), rel=1e-4)
    assert row["held out"] == pytest.approx(relative(studied.parts["held-out"]), rel=1e-4)


def test_every_method_is_better_than_none(table: dict[str, dict[str, Any]]) -> None:
    assert list(table) == list(METHODS)
    for method, row in table.items():
        if method != "zero":
            assert row["weight error"] < table["zero"]["weight error"], method
            assert row["held out"] < table["zero"]["held out"], method


def test_each_is_best_at_what_it_minimises(table: dict[str, dict[str, Any]]) -> None:
    """Of those over the base q(W): loftq-1 in the weights, qera-exact in the outputs."""
    same_base = {m: table[m] for m in ("zero", "qera-diag", "qera-exact", "loftq-1")}
    assert min(same_base, key=lambda m: same_base[m]["weight error"]) == "loftq-1"
    assert min(same_base, key=lambda m: same_base[m]["output error"]) == "qera-exact"
    assert table["qera-diag"]["output error"] < table["loftq-1"]["output error"]
    assert table["loftq-5"]["weight error"] < table["loftq-1"]["weight error"]


def test_cells_are_kept(tmp_path: Path) -> None:
    with CellCache(tmp_path) as cache:
        first = compare_starts(skewed(), [NF4], ["zero", "loftq-1"], 4, 8.0, cache)
        assert cache.computed == 4
        assert compare_starts(skewed(), [NF4], ["zero", "loftq-1"], 4, 8.0, cache) == first
        assert cache.computed == 4
        compare_starts(skewed(), [NF4], ["zero"], 4, 4.0, cache)
        assert cache.computed == 6


@pytest.mark.parametrize(
    ("methods", "rank", "alpha", "message"),
    [
        (["loftq"], 4, 8.0, "--methods must be out of zero, loftq-1"),
        (["zero"], 33, 8.0, "--rank must be between 1 and 32"),
        (["zero"], 0, 8.0, "--rank must be between 1"),
        (["zero"], 4, -1.0, "--alpha must be positive"),
        (["zero"], 4, math.inf, "--alpha must be positive"),
    ],
)
def test_bad_options(
    methods: list[str], rank: int, alpha: float, message: str, tmp_path: Path
) -> None:
    with CellCache(tmp_path) as cache, pytest.raises(ArgumentError, match=message):
        compare_starts(TwoLayers(), [NF4], methods, rank, alpha, cache)
