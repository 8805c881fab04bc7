"""The grid: what is measured, what it costs by formula, and that nothing wrong is timed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qlora_kernels as qlk
from bench import run
from bench.ceilings import Ceilings
from bench.grid import peers, sweep
from bench.grid.case import Case
from bench.grid.points import (
    COMPOSITE,
    GRID_OPS,
    LAYER,
    WITHOUT_CASE,
    Filters,
    Point,
    expand,
    storage,
)
from bench.grid.sweep import CASES, Limits, measure, run_sweep
from bench.shapes import layer_shapes, parse_shapes
from qlora_kernels.backends.registry import OPS, entries
from qlora_kernels.errors import ArgumentError
from qlora_kernels.testing.timing import WallClock

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e10, read=1e10, gemm={"bf16": 1e11, "fp32": 1e11})
NO_PEERS = Limits(rounds=5, seconds=0.0, peers=())


@pytest.fixture(autouse=True)
def collect_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep collects garbage before each point, which is most of its time among these tests."""
    monkeypatch.setattr(sweep, "gc", SimpleNamespace(collect=lambda: 0))


def small_clock() -> WallClock:
    clock = WallClock()
    clock.rotated_bytes = 1
    return clock


def filters(**changes: Any) -> Filters:
    settings: dict[str, Any] = {
        "ops": GRID_OPS,
        "backends": ("auto",),
        "formats": ("nf4",),
        "dtypes": ("bf16",),
        "shapes": {"tiny": (128, 128)},
        "tokens": (3,),
        "ranks": (4,),
    }
    return Filters(**{**settings, **changes})


def point(op: str, backend: str = "reference", **changes: Any) -> Point:
    (found,) = [p for p, _ in expand(filters(ops=(op,), backends=(backend,), **changes), "cpu")]
    return found


def test_every_op_has_a_case_or_a_reason() -> None:
    assert set(OPS) <= set(CASES) | WITHOUT_CASE
    assert set(GRID_OPS) == set(CASES)


@pytest.mark.parametrize("op", GRID_OPS)
def test_every_op_is_verified_and_timed_on_every_backend(op: str) -> None:
    backends = {entry.backend for entry in entries(COMPOSITE.get(op, (op,))[0])}
    formats = ("nf4", "nf4+fp32") if op == "dequantize" else ("nf4",)
    found = run_sweep(
        expand(filters(ops=(op,), backends=("all",), formats=formats), "cpu"),
        CPU,
        small_clock(),
        CEILINGS,
        NO_PEERS,
    )
    assert not found.refused
    measured = {p["backend"] for p in found.points}
    assert "reference" in measured
    assert measured | {p["backend"] for p in found.skipped} == backends
    assert all("CUDA" in p["reason"] for p in found.skipped if p["backend"] == "triton")
    for figures in found.points:
        assert figures["ours_ms"]["median"] > 0 and figures["nbytes"] > 0
        assert figures["share"] == pytest.approx(
            figures["floor_ms"] / figures["ours_ms"]["median"], rel=0.01, abs=1e-4
        )


def wrong_by_a_bit(result: Any) -> Any:
    """The result with something in it changed."""
    tensor = result
    while not isinstance(tensor, torch.Tensor):
        tensor = tensor[0]
    if tensor.is_floating_point():
        tensor.view(-1)[0] += 1 + 100 * tensor.abs().max()
    else:
        tensor.view(-1)[0] ^= 1
    return result


@pytest.mark.parametrize("op", [op for op in OPS if op not in WITHOUT_CASE])
def test_what_is_wrong_is_refused_and_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kernels.backends import registry

    listed = registry._ENTRIES[op]
    good = next(e for e in listed if e.backend == "reference")

    def broken(*arguments: Any, **named: Any) -> Any:
        result = good.fn(*arguments, **named)
        # Cases compare with the forced reference: only the backend under test is broken.
        return wrong_by_a_bit(result)

    other = dataclasses.replace(good, backend="broken", fn=broken, priority=10_000)
    # A grid point may run other ops on its way; those are right.
    for name in OPS:
        entry = next(e for e in registry._ENTRIES[name] if e.backend == "reference")
        added = other if name == op else dataclasses.replace(entry, backend="broken")
        monkeypatch.setitem(registry._ENTRIES, name, [added, *registry._ENTRIES[name]])
    registry._choose.cache_clear()
    try:
        found = run_sweep(
            expand(filters(ops=(op,), backends=("broken",)), "cpu"),
            CPU,
            small_clock(),
            CEILINGS,
            NO_PEERS,
        )
    finally:
        monkeypatch.undo()
        registry._choose.cache_clear()
    assert not found.points
    assert [p["op"] for p in found.refused] == [op]
    assert found.refused[0]["reason"]


def test_a_point_that_fails_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with an error that is none of Python's own, as Triton's are."""
    for error in (RuntimeError("no kernel image"), *triton_errors()):

        def fails(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(CASES["dropout"], "verify", fails)
        found = run_sweep(
            expand(filters(ops=("dropout", "double_quantize"), backends=("reference",)), "cpu"),
            CPU,
            small_clock(),
            CEILINGS,
            NO_PEERS,
        )
        assert [p["op"] for p in found.points] == ["double_quantize"]
        (refused,) = found.refused
        assert refused["op"] == "dropout" and type(error).__name__ in refused["reason"]


def triton_errors() -> list[BaseException]:
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return []
    return [OutOfResources(300_000, 232_448, "shared memory")]


def test_costs_by_hand() -> None:
    """A 128 x 128 weight, 3 tokens, rank 4, bf16."""
    codes, scales = 128 * 128 // 2, 128 * 128 // 64
    stored = codes + scales + 4 + 4  # one second-level scale and the offset
    dense, x, adapter = 2 * 128 * 128, 2 * 3 * 128, 4 * 4 * 256
    expected = {
        "quantize": (dense + stored, 0),
        "dequantize": (stored + dense, 0),
        "double_quantize": (4 * scales + scales + 4 + 4, 0),
        "dropout": (2 * x, 0),
        "quantized_matmul": (stored + 2 * x, 2 * 3 * 128 * 128),
        "qlora_linear": (stored + 2 * x + adapter, 2 * 3 * (128 * 128 + 4 * 256)),
        "qlora_linear_backward": (
            stored + 3 * x + 2 * adapter + 2 * 3 * 4,
            2 * 3 * (128 * 128 + 2 * 4 * 256),
        ),
    }
    for op, (nbytes, flops) in expected.items():
        case: Case = CASES[op](point(op), CPU, 1)
        assert (case.nbytes, case.flops) == (nbytes, flops), op
    plain = CASES["dequantize"](point("dequantize", formats=("nf4+fp32",)), CPU, 1)
    assert plain.nbytes == codes + 4 * scales + dense


def test_peers_are_measured_beside_and_missing_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(module: str) -> Any:
        raise peers.PeerMissing(f"{module.split('.')[0]} is not installed")

    monkeypatch.setattr(peers, "load", load)
    limits = Limits(rounds=5, seconds=0.0, peers=("torch bf16", "PEFT", "bits", "torchao"))
    figures = measure(point("quantized_matmul"), CPU, small_clock(), CEILINGS, limits)
    found = figures["peers_ms"]
    assert found["torch bf16 linear"]["median"] > 0
    assert found["bitsandbytes Linear4bit, eval"] == {"missing": "bitsandbytes is not installed"}
    assert found["torchao linear_nf4"] == {"missing": "torchao is not installed"}
    figures = measure(point(LAYER), CPU, small_clock(), CEILINGS, limits)
    assert figures["peers_ms"]["PEFT over bf16"] == {"missing": "peft is not installed"}
    assert figures["peers_ms"]["PEFT's formula over bf16"]["median"] > 0
    # A format that a peer does not have is no peer's fault.
    figures = measure(point("quantize", formats=("int4",)), CPU, small_clock(), CEILINGS, limits)
    missing = figures["peers_ms"]["bitsandbytes quantize_4bit"]
    assert missing == {"missing": "bitsandbytes has no int4"}


def test_installed_peers_run() -> None:
    pytest.importorskip("bitsandbytes", reason="in the bench extra")
    pytest.importorskip("peft", reason="in the hf extra")
    limits = Limits(rounds=5, seconds=0.0, peers=("bitsandbytes", "PEFT", "one by one"))
    for op in GRID_OPS:
        figures = measure(point(op), CPU, small_clock(), CEILINGS, limits)
        assert not [p for p in figures["peers_ms"].values() if "missing" in p], figures


def test_pefts_formula_is_pefts() -> None:
    pytest.importorskip("peft", reason="in the hf extra")
    torch.manual_seed(0)
    dense = torch.randn(48, 32).bfloat16()
    theirs = peers.peft_layer(peers.dense_linear(dense), 4)
    ours = peers.UnfusedLoRA(peers.dense_linear(dense), 48, 32, 4, peers.ALPHA)
    torch.nn.init.normal_(ours.lora_B.weight)
    state = dict(theirs.named_parameters())
    for name in ("lora_A", "lora_B"):
        (held,) = [p for key, p in state.items() if name in key]
        held.data.copy_(getattr(ours, name).weight)
    x = torch.randn(5, 32).bfloat16()
    assert torch.equal(ours(x), theirs(x))


def test_shapes_by_name() -> None:
    assert layer_shapes()["llama-3-70b.kv"] == (1024, 8192)
    assert parse_shapes("llama-7b.gate,12x40") == {
        "llama-7b.gate": (11008, 4096),
        "12x40": (12, 40),
    }
    assert list(parse_shapes("llama-7b")) == ["llama-7b.q", "llama-7b.gate", "llama-7b.down"]
    # Llama 3 8B's square projection is Llama 7B's.
    assert "llama-3-8b.q" not in parse_shapes("llama-7b,llama-3-8b")
    with pytest.raises(ArgumentError, match="shape must be"):
        parse_shapes("llama-9")


def test_filters() -> None:
    for wrong in ({"ops": ("nothing",)}, {"formats": ("nf5",)}, {"dtypes": ("fp8",)}):
        with pytest.raises(ArgumentError, match="must be out of"):
            filters(**wrong)
    assert storage("nf4").double_quant and not storage("nf4+fp32").double_quant
    able = [p for p, reason in expand(filters(ops=("dequantize",)), "cpu") if reason is None]
    assert len(able) == 1  # "auto" is one backend
    unable = [r for _, r in expand(filters(backends=("triton",)), "cpu")]
    assert unable and all(unable)


def test_command_prints_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--only", "dequantize,quantized_matmul", "--shape", "tiny", "--tokens", "2"]
    options += ["--backend", "reference,cuda", "--peers", "copy,bf16 linear", "--rounds", "5"]
    assert run.main([*options, "--seconds", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "dequantize/reference/nf4/bf16/N128-K128" in printed
    assert "torch sees no CUDA device" in printed or torch.cuda.is_available()
    (path,) = tmp_path.rglob("grid-*.json")
    record = json.loads(path.read_text())
    assert {p["op"] for p in record["points"]} == {"dequantize", "quantized_matmul"}
    assert record["machine"]["versions"]["torch"] and record["machine"]["commit"]
    assert record["ceilings"]["copy_bytes_per_second"] > 0
    assert run.main(["--device", "cuda"]) == (0 if torch.cuda.is_available() else 2)
    assert run.main(["--tokens", "0"]) == 2
    assert "tokens must be 1 or more" in capsys.readouterr().err


def test_library_is_restored() -> None:
    """The grid forces backends only while it calls."""
    measure(point("dropout"), CPU, small_clock(), CEILINGS, NO_PEERS)
    assert qlk.backends.registry.forced_backend() != "reference"
