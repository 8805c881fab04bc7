"""on_gpu's machinery and stages, on the CPU with tiny shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import on_gpu
from bench.gpu import checks, decode, driver, large, models, profiles, table, training
from bench.gpu.context import Context, read_stage, write_stage
from bench.gpu.llama import TINY, Llama
from bench.gpu.table import Target
from bench.grid import peers
from qlora_kernels.testing.timing import WallClock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def collect_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages collect garbage between models, which is most of their time among these tests."""
    for module in (decode, training):
        monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0))


def context(tmp_path: Path, stage: str, seconds: float = 60.0, **content: Any) -> Context:
    return Context(stage, CPU, True, tmp_path, seconds, content)


def scripted(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> None:
    """Let a stage's process run a line of Python instead."""
    monkeypatch.setattr(on_gpu, "GRACE", 1.0)
    monkeypatch.setattr(on_gpu, "OVERTIME", 0.5)
    monkeypatch.setattr(
        on_gpu,
        "command_of",
        lambda options, stage, budget: [sys.executable, "-c", scripts[stage.name]],
    )


def run(tmp_path: Path, stages: str, *more: str, minutes: float = 0.1) -> int:
    command = ["--out", str(tmp_path), "--minutes", str(minutes), "--device", "cpu", "--smoke"]
    return on_gpu.main([*command, "--only", stages, *more])


def test_a_stage_that_dies_or_hangs_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def keeping(name: str, status: str) -> str:
        record = {"stage": name, "status": status, "seconds": 1.0, "error": None}
        text = json.dumps({**record, "content": {"found": 7}})
        return f"open({str(tmp_path / name) + '.json'!r}, 'w').write({text!r}); "

    scripted(
        monkeypatch,
        {
            "tests": keeping("tests", "partial") + "import os; os.abort()",
            "table": keeping("table", "done"),
            "decode": keeping("decode", "partial") + "import time; time.sleep(60)",
        },
    )
    assert run(tmp_path, "tests,table,decode", minutes=0.07) == 1
    crashed, hung = read_stage(tmp_path, "tests"), read_stage(tmp_path, "decode")
    assert crashed and crashed["status"] == "failed" and crashed["content"] == {"found": 7}
    assert "exit status -6" in crashed["error"]
    assert hung and hung["status"] == "out of time" and hung["content"] == {"found": 7}
    summary = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert summary["table"]["status"] == "done"
    assert summary["training"]["status"] == "not run"
    assert "table       done" in capsys.readouterr().out
    # Once more: only what is not done.
    done = {name: keeping(name, "done") for name in ("tests", "decode")}
    scripted(monkeypatch, {**done, "table": "raise SystemExit(3)"})
    assert run(tmp_path, "tests,table,decode") == 0
    assert "table: done before" in capsys.readouterr().out
    assert run(tmp_path, "table", "--again") == 1


def test_a_real_stage_runs_fails_and_goes_on(tmp_path: Path) -> None:
    """In a process of its own, as on a GPU machine: it goes on where it stopped."""
    # What was wrong before is still wrong: the stage fails, with the record of it.
    write_stage(tmp_path, "random", "partial", {"done": 4, "wrong": {"seed 1": "off"}}, 9.0)
    assert run(tmp_path, "random", minutes=2) == 1
    found = read_stage(tmp_path, "random")
    assert found and found["status"] == "failed" and "1 of 6 wrong" in found["error"]
    assert found["content"]["done"] == checks.SMOKE_PROBLEMS


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "nothing")
    assert "must be out of environment, tests" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            on_gpu.main(["--out", str(tmp_path), "--minutes", "1"])
        assert "no CUDA device" in capsys.readouterr().err


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PEERS", ("numpy", "no_such_package"))
    stage = context(tmp_path, "environment")
    checks.environment(stage)
    found = read_stage(tmp_path, "environment")
    assert found and found["content"]["machine"]["versions"]["torch"]
    missing = "missing: no_such_package is not installed"
    assert found["content"]["peers"] == {"numpy": "loads", "no_such_package": missing}
    assert "missing" in found["content"]["tools"]["nvidia-smi"] or torch.cuda.is_available()


def test_counts_of_a_test_report(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure message="off by one"/></testcase>'
        '<testcase classname="a" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    found = checks.counts(report)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": {"a::c": "off by one"}}
    assert checks.counts(tmp_path / "none.xml")["passed"] == 0


def test_driver_and_poison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--device", "cpu", "--backend", "auto", "--few"]) == 0
    assert " run, 0 wrong" in capsys.readouterr().out
    stage = context(tmp_path, "poison")
    checks.poison(stage)
    assert stage.content["run"] > 5 and stage.content["wrong"] == {}
    seen: list[float] = []
    driver.poisoned(lambda: seen.append(torch.empty(1000).isnan().float().mean().item()))
    assert seen == [1.0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_poison_finds_what_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(point: Any, device: torch.device) -> None:
        assert torch.empty(3).isfinite().all(), "an element was left out"

    monkeypatch.setattr(driver, "check", check)
    with pytest.raises(AssertionError, match="wrong, the first"):
        checks.poison(context(tmp_path, "poison"))
    found = read_stage(tmp_path, "poison")
    assert found and "an element was left out" in next(iter(found["content"]["wrong"].values()))


def test_table_and_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (
        Target("dequantize", table.SMALL, formats=("nf4",), target_us=1e9, share=0.0),
        Target("quantized_matmul", table.LARGE, (64,), target_us=1e-9),
        Target("qlora_linear", table.SMALL, (1,), ranks=(16,), of_peer=("ours without", 1e9)),
        Target("dropout", table.SMALL, (4,)),
    )
    monkeypatch.setattr(table, "TARGETS", chosen)
    clock = WallClock()
    clock.rotated_bytes = 1
    monkeypatch.setattr(table, "clock_for", lambda _: clock)
    stage = context(tmp_path, "table")
    table.targets(stage)
    points = {point["op"]: point for point in stage.content["points"]}
    reached = {op: point["target"]["reached"] for op, point in points.items()}
    assert reached == {
        "dequantize": True,
        "quantized_matmul": False,
        "qlora_linear": True,
        "dropout": None,
    }
    # Going on: what is there is not measured again.
    marked = [{**p, "mark": 1} for p in stage.content["points"][:2]]
    again = context(tmp_path, "table", **{**stage.content, "points": marked})
    table.targets(again)
    assert [("mark" in p) for p in again.content["points"]] == [True, True, False, False]
    layers = context(tmp_path, "layer")
    table.layers(layers)
    (layer,) = layers.content["points"]
    assert layer["peers_ms"]["PEFT's formula over bf16"]["median"] > 0
    with pytest.raises(AssertionError, match="1 wrong"):
        monkeypatch.setattr(table, "run_sweep", lambda *_: refusing())
        table.targets(context(tmp_path, "table"))


def refusing() -> Any:
    from bench.grid.sweep import Sweep

    return Sweep(refused=[{"key": "a", "reason": "off"}])


def test_the_whole_table_exists_for_a_gpu() -> None:
    """Every target names points that a GPU's backends have."""
    from qlora_kernels.backends.registry import entries

    for target in table.TARGETS:
        backends = {entry.backend.split(":")[0] for entry in entries(target.op)}
        assert {"triton", "cuda"} <= backends, target.op
        found = list(
            table.points_of(
                target.op, {"a": target.shape}, target.tokens, target.formats, target.ranks, "cuda"
            )
        )
        assert len(found) >= 2 * len(target.tokens) * len(target.formats), target.op


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(TINY.vocabulary, (1, 12), generator=torch.Generator().manual_seed(0))


def test_llama_computes_what_transformers_does(ids: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers", reason="in the hf extra")
    torch.manual_seed(1)
    ours = Llama(TINY, lambda n, k: torch.nn.Linear(k, n, bias=False), CPU, torch.float32)
    theirs = transformers.LlamaForCausalLM(large.config_for(TINY)).float()
    state = {
        (name if name.startswith("lm_head") else f"model.{name}"): tensor
        for name, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    mine, wanted = ours(ids, labels=ids), theirs(input_ids=ids, labels=ids)
    torch.testing.assert_close(mine.logits, wanted.logits)
    torch.testing.assert_close(mine.loss, wanted.loss)


def test_llama_decodes_what_it_computes_at_once(ids: torch.Tensor) -> None:
    model = models.make_model(models.OURS, TINY, CPU, torch.float32, rank=4, checkpointing=False)
    model.eval()
    with torch.no_grad():
        whole = model(ids).logits
        caches = model.new_caches(1, ids.shape[1])
        for i in range(ids.shape[1]):
            at = torch.tensor([i])
            step = model(ids[:, i : i + 1], caches=caches, position=at).logits
            torch.testing.assert_close(step[:, 0], whole[:, i], atol=1e-4, rtol=1e-4)


def test_training_measures_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 1)
    monkeypatch.setattr(training, "WARMUP", 1)
    losses = {}
    accelerated = "QLoRA, PEFT + bitsandbytes, accelerated"
    chosen = (models.OURS, models.GROUPED, "LoRA bf16, PEFT's formula", accelerated)
    assert set(chosen) <= set(models.KINDS)
    for kind in chosen:
        row = training.one_kind(kind, TINY, CPU, torch.float32, 1, 8, 0.0)
        if "missing" in row:
            assert "not installed" in row["missing"]
            continue
        losses[kind] = row["loss"]
        assert row["tokens_per_second"] > 0 and row["peak_bytes"] > row["lasting_bytes"] > 0
    assert {models.OURS, models.GROUPED, "LoRA bf16, PEFT's formula"} <= set(losses)

    def missing(*_: Any, **__: Any) -> Any:
        raise peers.PeerMissing("peft is not installed")

    monkeypatch.setattr(training, "make_model", missing)
    stage = context(tmp_path, "training")
    training.steps(stage)
    rows = stage.content["rows"]
    assert len(rows) == 2 * len(models.KINDS)
    assert all(row == {"missing": "peft is not installed"} for row in rows.values())


def test_same_weights_for_every_kind() -> None:
    """Adapters begin as zero, so the kinds over a dense base start from one loss, and ours from
    nearly the same."""
    ids = torch.arange(8)[None]
    found = {}
    kinds = (models.OURS, models.GROUPED, "LoRA bf16, ours", "LoRA bf16, PEFT's formula")
    for kind in kinds:
        model = models.make_model(kind, TINY, CPU, torch.float32, rank=4)
        found[kind] = model(input_ids=ids, labels=ids).loss.item()
        assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    assert found["LoRA bf16, ours"] == found["LoRA bf16, PEFT's formula"]
    assert found[models.OURS] == pytest.approx(found["LoRA bf16, ours"], abs=0.05)
    assert found[models.OURS] == found[models.GROUPED] != found["LoRA bf16, ours"]


def test_large_models_against_the_planner(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="in the hf extra")
    stage = context(tmp_path, "sixty_five")
    large.models(stage)
    row = stage.content["rows"]["tiny"]
    assert abs(row["peak_over_plan"]) <= large.WITHIN
    kept = json.loads(large.PREDICTIONS.read_text())
    assert set(kept) == {f"{m}, {o}" for m, _ in large.CARDS for o in ("adamw", "adamw-8bit")}
    sizes = large.Sizes.named("llama-7b")
    now = large.prediction(sizes, torch.bfloat16, large.SEQUENCE, "adamw", large.RANK)
    assert kept["llama-7b, adamw"] == now


def test_decode_and_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "KINDS", (models.OURS,))
    stage = context(tmp_path, "decode")
    decode.tokens(stage)
    assert set(stage.content["rows"][models.OURS]) == {"1", "2"}
    assert stage.content["rows"][models.OURS]["1"]["tokens_per_second"] > 0
    stage = context(tmp_path, "profile")
    profiles.profiles(stage)
    rows = stage.content["torch"]
    assert len(rows) == len(profiles.PROFILED)
    assert all(row and row[0]["us_per_call"] > 0 for row in rows.values())
    assert "missing" in stage.content["ncu"]
