"""tune: which candidates there are, and when one is worth a row of the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import run, tune
from bench.grid.points import Point
from qlora_kernels.backends import launch_config
from qlora_kernels.backends.device import H200
from qlora_kernels.backends.launch_config import MatmulConfig, MatmulSizes, forward_config
from qlora_kernels.testing.timing import Timing

SIZES = MatmulSizes(64, 8192, 4096, torch.bfloat16, 64)
BASE = MatmulConfig(64, 128, 64, 2, 4, 4)


def timing(seconds: float, scatter: float = 0.01) -> Timing:
    return Timing(tuple(seconds * (1 + scatter * (i % 5 - 2) / 2) for i in range(30)))


def other(**changes: int) -> MatmulConfig:
    return MatmulConfig(**{**vars(BASE), **changes})


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({BASE: timing(1.0), other(tile_m=32): timing(0.8)}, other(tile_m=32)),
        ({BASE: timing(1.0), other(tile_m=32): timing(1.2)}, None),
        ({BASE: timing(1.0), other(tile_m=32): timing(0.98)}, None),  # too little to matter
        ({BASE: timing(1.0, 0.6), other(tile_m=32): timing(0.9, 0.6)}, None),  # within noise
        ({other(tile_m=32): timing(0.5)}, None),  # nothing to compare with
        (
            {BASE: timing(1.0), other(splits=1): timing(0.8), other(tile_n=64): timing(0.7)},
            other(tile_n=64),
        ),
    ],
)
def test_choice(times: dict[MatmulConfig, Timing], expected: MatmulConfig | None) -> None:
    assert tune.choose(times, BASE) == expected


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tokens", [8, 64, 512])
def test_candidates_are_ones_the_kernel_takes(direction: str, tokens: int) -> None:
    sizes = SIZES._replace(tokens=tokens)
    base = tune.heuristic(direction, sizes, H200)
    found = tune.candidates(base, sizes, direction)
    assert found[0] == base and len(found) == len(set(found)) > 20
    for config in found[1:]:
        assert 1 <= tune.differences(config, base) <= 2
        assert config.tile_k % 64 == 0 and sizes.in_features % config.tile_k == 0
        for tile in (config.tile_m, config.tile_n, config.tile_k):
            assert tile >= 16 and tile & (tile - 1) == 0
        assert direction == "forward" or config.splits == 1


def test_heuristic_is_not_the_table() -> None:
    plain, odd = tune.heuristic("forward", SIZES, H200), other(splits=3)
    with tune.using("forward", H200, SIZES, odd):
        assert forward_config(SIZES, H200) == odd
        assert forward_config(SIZES._replace(tokens=65), H200) != odd  # keys are exact
        assert tune.heuristic("forward", SIZES, H200) == plain
    assert forward_config(SIZES, H200) == plain
    assert (H200.name, "forward", SIZES) not in launch_config.TUNED


def test_rows_are_source() -> None:
    row = tune.entry(H200.name, "backward", SIZES, BASE)
    names = {"MatmulSizes": MatmulSizes, "MatmulConfig": MatmulConfig, "torch": torch}
    table = eval("{" + row + "}", names)
    assert table == {(H200.name, "backward", SIZES): BASE}


def test_wrong_candidates_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake case that is wrong under one configuration and fast under another."""
    good, wrong = other(tile_m=32), other(tile_n=64)
    point = Point("quantized_matmul", "triton", "nf4", "bf16", "x", 8192, 4096, 64)

    def active() -> MatmulConfig:
        return forward_config(tune.sizes_of(point), H200)

    class FakeCase:
        copies = 2

        def __init__(self, *_: Any) -> None:
            pass

        def verify(self) -> None:
            assert active() != wrong, "off by one"

        def call(self, i: int) -> None:
            pass

    class FakeClock:
        rotated_bytes = 1

        def time(self, calls: Any, **_: Any) -> dict[str, Timing]:
            assert active() != wrong
            return {"ours": timing(0.5 if active() == good else 1.0)}

    monkeypatch.setitem(tune.CASES, "quantized_matmul", FakeCase)
    monkeypatch.setattr(tune, "clock_for", lambda _: FakeClock())
    monkeypatch.setattr(tune, "device_facts", lambda _: H200)
    monkeypatch.setattr(tune, "heuristic", lambda *_: BASE)
    monkeypatch.setattr(tune, "candidates", lambda *_: [BASE, good, wrong])
    options = run.build_parser().parse_args(["--tune"])
    found = tune.tune_one("forward", point, torch.device("cpu"), options)
    assert found["chosen"] == repr(good)
    assert "off by one" in found["failed"][repr(wrong)]
    assert set(found["times_ms"]) == {repr(BASE), repr(good)}
    assert good == eval("{" + found["entry"] + "}", {**vars(launch_config)}).popitem()[1]
    assert not launch_config.TUNED


def test_problems_are_those_of_the_fused_kernels() -> None:
    options = run.build_parser().parse_args(["--shape", "llama-7b.q", "--tokens", "1,16,4096"])
    found = list(tune.problems(options, "cuda"))
    if torch.cuda.is_available():
        assert {(d, p.M) for d, p in found} == {("forward", 16), ("backward", 16)}
    else:
        assert not found  # no backend to tune here


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--tune"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
