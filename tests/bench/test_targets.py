"""The table of targets, the cases of memory and of accelerate, and the command line around them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import command, records, run
from bench.gpu.llama import TINY
from bench.grid import peers
from bench.records import BytesRow, Row, Settings
from qlora_kernels import cli
from qlora_kernels.testing.live_memory import saved_bytes
from qlora_kernels.testing.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(threads=2, rounds=5, seconds=0.0)


def row(ours: float, theirs: float, **target: float) -> Row:
    return Row("w", "p", Timing((ours,) * 5), Timing((theirs,) * 5), **target)


def test_verdicts_of_rows() -> None:
    assert row(1.0, 3.0, times_faster=3.0).passed is True
    assert row(1.0, 2.9, times_faster=3.0).passed is False
    assert row(1.25, 1.0, at_most=1.25).passed is True
    assert row(1.26, 1.0, at_most=1.25).passed is False
    assert row(1.0, 1.0).passed is None
    assert BytesRow("w", "p", 5, 100, 0.05).passed is True
    assert BytesRow("w", "p", 6, 100, 0.05).passed is False
    assert BytesRow("w", "p", 6, 100).passed is None
    assert BytesRow("w", "p", 0, 0, 1.0).passed is True
    text = records.table([row(1.0, 2.0), BytesRow("w", "p", 1 << 20, 4 << 20, 0.1)])
    assert "2.00x faster" in text and "0.250x the bytes" in text and "MISS" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_targets_are_printed_recorded_and_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_case(name: str) -> run.Case:
        if name == "quantize":
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
        return lambda settings: [row(1.0, 2.0, times_faster=3.0), BytesRow("b", "p", 1, 2, 0.9)]

    monkeypatch.setattr(run, "find_case", find_case)
    options = ["--only", "quantize,dequantize", "--out", str(tmp_path)]
    assert run.main(options) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 targets missed" in printed
    assert "not measured: quantize: bitsandbytes is not installed" in printed
    assert run.main([*options, "--strict"]) == 1
    (path,) = tmp_path.rglob("*.json")
    record = json.loads(path.read_text())
    assert path.stem == "dequantize" and len(record["rows"]) == 2
    assert record["rows"][1]["ours_bytes"] == 1
    with pytest.raises(SystemExit):
        run.main(["--only", "quantize,nothing"])


def test_every_case_is_found() -> None:
    for name in run.case_names():
        module = pytest.importorskip(f"bench.cases.{name}", reason="needs a peer")
        assert callable(getattr(module, f"case_{name}"))
    assert {"accelerate", "loading", "memory", "quantized_matmul"} <= set(run.case_names())


def test_saved_bytes_by_hand() -> None:
    """x·w keeps both; a view keeps the storage it views, once."""
    x, w = (torch.ones(10, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: x * w, []) == 2 * 40
    assert saved_bytes(lambda: x * w, [x]) == 40
    assert saved_bytes(lambda: (x[:5] * w[:5], x[5:] * w[5:]), []) == 2 * 40
    assert saved_bytes(lambda: x + w, []) == 0
    assert saved_bytes(lambda: (x * w).exp(), [x, w]) == 40  # exp keeps its result


def test_memory_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """At tiny sizes: ours keeps M·R beyond x, PEFT's formula x in fp32 and more."""
    from bench.cases import memory

    monkeypatch.setattr(memory, "SHAPE", (128, 512))
    monkeypatch.setattr(memory, "TOKENS", 64)
    monkeypatch.setattr(memory, "MODEL", TINY)
    monkeypatch.setattr(memory, "SEQUENCE", 16)
    kinds = (memory.OURS, "LoRA bf16, PEFT's formula", "LoRA bf16, ours")
    assert set(kinds) <= set(memory.KINDS)
    monkeypatch.setattr(memory, "KINDS", kinds)
    rows = memory.case_memory(SETTINGS)
    by_work = {(r.work, r.peer): r for r in rows}
    plain = by_work["saved beyond x, LoRA layer, dropout 0", "x itself"]
    assert plain.ours == 64 * memory.RANK * 2 and plain.theirs == 64 * 512 * 2
    dropped = by_work["saved beyond x, LoRA layer, dropout 0.1", "x itself"]
    assert dropped.ours <= plain.ours + 8  # a seed
    steps = [r for r in rows if r.work.startswith("peak of a training step")]
    assert steps and all(r.ours > 0 for r in steps)
    if any(r.peer == "the plan" for r in steps):
        assert by_work["peak of a training step, ours", "the plan"].ratio == pytest.approx(1, 0.1)


def test_missing_peers_leave_rows_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.cases import memory

    def load(module: str) -> None:
        raise peers.PeerMissing(f"{module} is not installed")

    monkeypatch.setattr(peers, "load", load)
    monkeypatch.setattr(memory, "SHAPE", (64, 64))
    assert [r.peer for r in memory.layer_rows()] == ["x itself"] * 2
    assert "PEFT over bf16 is missing: peft is not installed" in capsys.readouterr().err


def test_accelerate_case(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="in the bench extra")
    pytest.importorskip("peft", reason="in the hf extra")
    from bench.cases import accelerate

    rows = accelerate.case_accelerate(SETTINGS, TINY, 8, (64,), (3,))
    kinds = [
        "float32, dropout 0",
        "float32, dropout 0.05",
        "bfloat16, dropout 0",
        "bfloat16, dropout 0.05",
    ]
    assert [r.work.partition(", ")[2] for r in rows[:4]] == kinds
    works = [f"64 x 64 layer after accelerate(), 3 tokens, {kind}" for kind in kinds]
    assert [r.work for r in rows[4:]] == works
    assert [r.times_faster for r in rows] == [1.0, 1.0, 1.3, 1.3, 1.0, 1.0, 1.0, 1.0]
    assert all(r.ours.median > 0 for r in rows)

    class Other(nn.Module):
        def __init__(self, loss: float) -> None:
            super().__init__()
            self.value = loss

        def forward(self, **_: object) -> Timing:
            return type("Out", (), {"loss": torch.tensor(self.value)})()  # type: ignore[return-value]

    with pytest.raises(AssertionError, match="losses"):
        accelerate.verify(Other(1.0), Other(1.1), torch.zeros(1, 1), 1e-2)
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    accelerate.verify_layer(one, one, torch.ones(2, 4), 1e-6)
    with pytest.raises(AssertionError, match="differ"):
        accelerate.verify_layer(one, other, torch.ones(2, 4), 1e-2)


@pytest.mark.slow
def test_loading_case() -> None:
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason="in the hf extra")
    from bench.cases import loading

    row, whole = loading.case_loading(SETTINGS, TINY)
    # TINY's linear layers at 4.127 bits a weight, embeddings, output layer and norms in bf16.
    linear = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    held = 2 * 96 * 128 * 2 + 5 * 128 * 2 + linear * 4.127 / 8
    shard = row.theirs - held
    # The largest of about eight files of the checkpoint.
    assert whole.theirs / 16 <= shard <= whole.theirs / 4
    assert row.ours == whole.ours >= 0


def test_cli_hands_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(run, "main", lambda arguments: given.append(arguments) or 0)
    assert cli.main(["bench", "--only", "dropout"]) == 0
    assert cli.main(["bench", "run", "--shape", "tiny"]) == 0
    assert given == [["--only", "dropout"], ["--shape", "tiny"]]
    assert cli.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in command.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(["bench", "compare", "--help"])
    assert "noise model" in capsys.readouterr().out


def test_without_a_checkout_it_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main(["bench"]) == 2
    assert "run this from a checkout" in capsys.readouterr().err


def test_bench_is_found_from_anywhere(tmp_path: Path) -> None:
    command_line = [sys.executable, "-m", "qlora_kernels", "bench", "compare", "a", "b"]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "compare: record must be a file or a folder, got a" in done.stderr
