"""The assignment is the best there is, and what it predicts is what comes out."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import qlora_kernels as qlk
from qlora_kernels.errors import ArgumentError, CheckpointError, QLKError
from qlora_kernels.lab.assignment import (
    best_uniform,
    bits_of,
    compared,
    load_assignment,
    solve,
    write_assignment,
)
from qlora_kernels.lab.cache import CellCache
from qlora_kernels.lab.sensitivity import Cost, measure_layers
from qlora_kernels.lab.variants import Variant, make_variants
from tests.lab.running import TwoLayers

scipy = pytest.importorskip("scipy", reason="in the lab extra")
VARIANTS = [Variant.of("nf4", {"block_size": size}) for size in (32, 64, 256)]


def random_costs(seed: int) -> dict[str, list[Cost]]:
    """Five layers under three variants; errors over twelve powers of ten."""
    chance = random.Random(seed)
    return {
        f"layer{n}": [
            Cost(f"layer{n}", v, 1000 * (n + 1), chance.randint(300, 900) * (n + 1), error)
            for v, error in zip(
                VARIANTS, (10 ** chance.uniform(-12, 0) for _ in VARIANTS), strict=True
            )
        ]
        for n in range(5)
    }


def brute_force(costs: dict[str, list[Cost]], budget: float) -> float | None:
    """The least total error of all 3^5 assignments within the budget."""
    fitting = [
        sum(cost.error for cost in picked)
        for picked in itertools.product(*costs.values())
        if bits_of(picked) <= budget
    ]
    return min(fitting) if fitting else None


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all(seed: int) -> None:
    costs = random_costs(seed)
    for budget in (3.0, 4.0, 4.6, 5.5, 8.0):
        wanted = brute_force(costs, budget)
        if wanted is None:
            with pytest.raises(ArgumentError, match="--budget must be at least"):
                solve(costs, budget)
            continue
        picked = solve(costs, budget)
        assert list(picked) == list(costs)
        assert bits_of(list(picked.values())) <= budget + 1e-6
        assert sum(cost.error for cost in picked.values()) == pytest.approx(wanted, rel=1e-6)


def test_best_uniform_gives_all_layers_the_same() -> None:
    costs = random_costs(3)

    def total(picked: Sequence[Cost]) -> float:
        return sum(cost.error for cost in picked)

    columns = [[layer[index] for layer in costs.values()] for index in range(3)]
    fitting = [column for column in columns if bits_of(column) <= 4.8]
    found = best_uniform(costs, 4.8)
    assert found is not None
    assert total(list(found.values())) == min(map(total, fitting))
    assert best_uniform(costs, 0.1) is None


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(QLKError, match=r"pip install 'qlora_kernels\[lab\]'"):
        solve(random_costs(0), 8.0)


def test_mixed_beats_uniform_and_comes_out_as_predicted(tmp_path: Path) -> None:
    """Two layers that matter differently: bits go where they count."""
    studied = TwoLayers()
    variants, _ = make_variants(["nf4", "int4"], {"block_size": [32, 128]})
    with CellCache(tmp_path) as cache:
        costs = measure_layers(studied, variants, "model", cache)
    picked = solve(costs, 4.2)
    rows = {row["assignment"]: row for row in compared(studied, costs, picked, 4.2, "model")}
    mixed, uniform = rows["mixed"], rows["best uniform"]
    assert mixed["bits"] <= 4.2 + 1e-6
    assert mixed["predicted error"] <= uniform["predicted error"]
    assert mixed["realised error"] <= uniform["realised error"]
    for row in (mixed, uniform):
        assert row["realised error"] == pytest.approx(row["predicted error"], rel=0.3)
    assert rows["dense"]["realised error"] == 0


def test_replace_linear_takes_it(tmp_path: Path) -> None:
    picked = {
        "0": Cost("0", Variant.of("int4", {"block_size": 32}), 4096, 1, 0.0),
        "2": Cost("2", Variant.of("nf4", {"scale_store": "fp32"}), 2048, 1, 0.0),
    }
    path = write_assignment(tmp_path / "a.json", picked, {"budget": 4.2})
    formats = load_assignment(path)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    weight = model[0].weight.detach().clone()
    qlk.replace_linear(model, rank=2, format=formats)
    first, last = model[0], model[2]
    assert isinstance(first, qlk.QLoRALinear)
    assert isinstance(last, qlk.QLoRALinear)
    assert first.format == qlk.get_format("int4").override(block_size=32)
    assert last.format == qlk.get_format("nf4").override(double_quant=False)
    assert torch.equal(first.dequantize(), qlk.dequantize(qlk.quantize(weight, formats["0"])))


def test_a_layer_without_a_format(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    with pytest.raises(ArgumentError, match="format must be a format for every layer, got none"):
        qlk.replace_linear(model, rank=2, format={"0": "nf4"})
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"kind": "x", "layers": {}})])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CheckpointError):
        load_assignment(path)
    with pytest.raises(CheckpointError):
        load_assignment(tmp_path / "nowhere.json")
