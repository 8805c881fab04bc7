"""The small parts: exit codes, schedules, seeds, peak memory, stop requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_kernels import replace_linear
from qlora_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError, QLKError
from qlora_kernels.finetune.checkpoint import difference
from qlora_kernels.finetune.console import exit_code_of
from qlora_kernels.finetune.interrupt import EndedError, Interrupted, StopRequest, stop_on_signals
from qlora_kernels.finetune.memory import base_weight_bytes
from qlora_kernels.finetune.schedule import learning_rate_factor
from qlora_kernels.finetune.settings import Settings, derived_seed, resolve_device, resolve_dtype
from qlora_kernels.nn import lora_parameters


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ArgumentError("a must be b, got c"), 2, "error: a must be b, got c\n"),
        (ArgumentTypeError("of two\n  lines"), 2, "error: of two lines\n"),
        (CheckpointError("foreign"), 1, "error: foreign\n"),
        (QLKError("other"), 1, "error: other\n"),
        (OSError(5, "Input/output error", "x"), 1, "error: [Errno 5] Input/output error: 'x'\n"),
        (Interrupted("stopped", signal.SIGTERM), 143, "stopped\n"),
        (EndedError("", 7), 7, ""),
        (KeyboardInterrupt(), 130, "stopped before anything began\n"),
        (MemoryError(), 1, "error: finetune: no more memory; a smaller --batch or --seq-len"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "error: finetune: CUDA out of"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(raising(error)) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(words) and err.count("\n") <= 1


def test_a_fault_of_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code_of(raising(ZeroDivisionError()))
    assert exit_code_of(lambda: None) == 0


def test_schedules() -> None:
    def factors(schedule: str) -> list[float]:
        return [learning_rate_factor(step, 10, schedule, 2) for step in range(10)]

    for schedule in ("cosine", "linear", "constant"):
        assert factors(schedule)[:3] == [0.5, 1.0, 1.0]
    assert factors("constant")[2:] == [1.0] * 8
    assert factors("linear")[2:] == pytest.approx([1 - n / 8 for n in range(8)])
    assert factors("cosine")[6] == pytest.approx(0.5)
    assert 0 < factors("cosine")[9] < 0.05
    assert learning_rate_factor(0, 1, "cosine", 1) == 1.0


def test_derived_seeds_are_a_fixed_function() -> None:
    seeds = {derived_seed(s, use, n) for s in (0, 1) for use in ("a", "b") for n in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Checkpoints and published losses depend on it.
    assert derived_seed(0, "step", 0) == 1373431530665165896


def test_difference_names_the_option() -> None:
    saved = {"seq_len": 32, "lr": 0.1, "text": "a" * 64}
    assert difference(saved, dict(saved)) is None
    assert difference(saved, {"seq_len": 64}) == "--seq-len is 32 there and 64 here"
    assert difference({}, {"lr": 0.1}) == "--lr is None there and 0.1 here"
    assert difference(saved, {"text": "b" * 64}) == "the text is aaaaaaaaaaaa… there and " + (
        "bbbbbbbbbbbb… here"
    )


def test_a_second_signal_is_not_caught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals(StopRequest()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(Interrupted, match="stopped at tea; --resume continues"):
            stop.check("at tea")
    assert signal.getsignal(signal.SIGTERM) is before


PEAK = """
import torch
from qlora_kernels.finetune.memory import PeakMemory
block = torch.ones(25_000_000)
del block
memory = PeakMemory(torch.device("cpu"))
print(memory.read())
block = torch.ones(25_000_000)
del block
print(memory.read())
"""


def test_peak_memory_is_the_highest_and_starts_at_zero() -> None:
    # In a process of its own: what other tests left free on the heap would serve the second block.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 20_000_000
    assert 95_000_000 < after < 130_000_000


def test_base_weight_bytes_leave_adapters_out() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64))
    dense = base_weight_bytes(model, [])
    assert dense == 4 * (64 * 64 + 2 * 64)
    replace_linear(model, rank=4, quantize=False)
    assert base_weight_bytes(model, lora_parameters(model)) == dense


def test_settings_refuse_what_they_are_given_wrong(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--method must be one of full, lora, qlora, got x"):
        Settings("x", tmp_path)
    with pytest.raises(ArgumentError, match="--dtype"):
        Settings("lora", tmp_path, dtype="float64")
    with pytest.raises(ArgumentError, match=r"--format must be one of .*nf4.*, got nf5"):
        Settings("lora", tmp_path, format="nf5")


def test_devices_and_dtypes() -> None:
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("bf16", cpu) == resolve_dtype("bfloat16", cpu) == "bfloat16"
    assert resolve_dtype("fp32", cpu) == "float32"
    assert resolve_dtype("auto", cpu) in ("float32", "bfloat16")
    for name in ("cuda:x", "mps", "", "cpu:0"):
        with pytest.raises(ArgumentError, match="--device must be auto, cpu, cuda or cuda:N"):
            resolve_device(name)
