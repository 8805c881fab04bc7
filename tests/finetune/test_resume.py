"""Killed at any moment, stopped by a signal, or refused: `--resume` goes on, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kernels.errors import CheckpointError
from qlora_kernels.finetune.checkpoint import load_checkpoint, load_header
from qlora_kernels.finetune.optimizers import make_optimizer
from qlora_kernels.finetune.settings import EMBEDDED
from tests.finetune.running import (
    Command,
    kill,
    losses,
    slow_steps,
    snapshot,
    wait_for,
    waiting_steps,
    write_corpus,
)

METHODS = ["full", "lora", "qlora"]
# Dropout, so that its seeds must be those of the uninterrupted run too.
OPTIONS = ("--dropout", "0.1", "--steps", "12", "--checkpoint-every", "1")

# Each stops the process dead at one moment of writing a file, the third time it comes there.
DIE = """
import os, signal
from qlora_kernels import files
seen = 0
def die_third_time(*args):
    global seen
    seen += 1
    if seen == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""
KILL_POINTS = {
    "half a checkpoint written": """
write_chunks = files.safetensors_chunks
def chunks(*args):
    for number, chunk in enumerate(write_chunks(*args)):
        if number == 20:
            die_third_time()
        yield chunk
files.safetensors_chunks = chunks
""",
    "written and not yet renamed": """
real_replace = os.replace
def replace(*args):
    die_third_time()
    real_replace(*args)
files.os.replace = replace
""",
    "renamed and not yet synced": """
real_sync = files.sync_folder
def sync(*args):
    die_third_time()
    real_sync(*args)
files.sync_folder = sync
""",
}


def step_of(out: Path) -> int:
    """How far the checkpoint in ``out`` is; 0 without one."""
    path = out / "checkpoint.safetensors"
    return load_header(path).progress.step if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments(method: str, command: Command) -> None:
    """Twice killed, once after a random time from the start and once a random while after a
    checkpoint, then run to its end."""
    chance = random.Random(f"kill {method}")
    whole, pieces = command.folder / "whole", command.folder / "pieces"
    assert command.here("--method", method, *OPTIONS, "--out", "whole") == 0
    options = ("--method", method, *OPTIONS, "--out", "pieces", "--resume")
    # Too slow to end before it is killed.
    process = command.start(*options, prelude=slow_steps(0.4))
    time.sleep(chance.uniform(0, 4))
    kill(process)
    first = step_of(pieces)
    process = command.start(*options, prelude=waiting_steps(first + 1, method))
    wait_for(lambda: step_of(pieces) > first, process)
    time.sleep(chance.uniform(0, 0.1))
    kill(process)
    assert not (pieces / "report.json").exists()
    assert command.here(*options) == 0
    assert losses(pieces, method) == losses(whole, method)
    assert len(losses(pieces, method)[0]) == 12
    trained = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (pieces / trained).read_bytes() == (whole / trained).read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], float, float]:
    """What a short QLoRA run measures that nothing stops."""
    folder = tmp_path_factory.mktemp("unbroken")
    command = Command(folder, write_corpus(folder / "corpus.txt"))
    options = ("--method", "qlora", "--dropout", "0.1", "--out", str(folder / "whole"))
    assert command.here(*options) == 0
    return losses(folder / "whole", "qlora")


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_while_saving(
    point: str, command: Command, unbroken: tuple[list[float], float, float]
) -> None:
    options = ("--method", "qlora", "--dropout", "0.1", "--out", "pieces")
    killed = command.run(*options, prelude=DIE + KILL_POINTS[point])
    assert killed.returncode == -signal.SIGKILL
    pieces = command.folder / "pieces"
    # The third checkpoint of three, the second of which is whole.
    assert load_checkpoint(pieces / "checkpoint.safetensors").progress.step in (4, 6)
    assert command.here(*options, "--resume") == 0
    assert losses(pieces, "qlora") == unbroken
    leftovers = [path.name for path in pieces.iterdir() if path.name.endswith(".tmp")]
    assert leftovers == []


def test_killed_between_adapter_and_report(command: Command) -> None:
    prelude = "from qlora_kernels.finetune import run\nimport os\n"
    prelude += "run.write_report = lambda *args: os.kill(os.getpid(), 9)\n"
    options = ("--method", "lora", "--out", "run")
    assert command.run(*options, prelude=prelude).returncode == -signal.SIGKILL
    run = command.folder / "run"
    adapter = (run / "adapter_model.safetensors").read_bytes()
    assert not (run / "report.json").exists()
    assert command.here(*options, "--resume") == 0
    assert (run / "adapter_model.safetensors").read_bytes() == adapter
    assert len(losses(run, "lora")[0]) == 6


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_ends_cleanly(number: int, status: int, command: Command) -> None:
    options = ("--method", "qlora", "--dropout", "0.1", "--steps", "20", "--out", "run")
    # One checkpoint at the end only: what is saved is saved by the signal.
    options = (*options, "--checkpoint-every", "1000")
    process = command.start(*options, prelude=waiting_steps(6, "qlora"))
    assert process.stderr is not None
    for line in process.stderr:
        if "step 6 of 20" in line:
            break
    _, err = kill(process, number)
    run = command.folder / "run"
    assert process.returncode == status
    assert "Traceback" not in err
    assert "--resume continues" in err.splitlines()[-1]
    assert 6 <= step_of(run) < 20
    if number == signal.SIGTERM:
        return  # what was saved is the same
    assert command.here(*options, "--resume") == 0
    assert command.here(*options[:-3], "whole", *options[-2:]) == 0
    assert losses(run, "qlora") == losses(command.folder / "whole", "qlora")


def test_signal_before_the_first_step(command: Command) -> None:
    prelude = "import os, signal\nfrom qlora_kernels.finetune import run\nload = run.load_base\n"
    prelude += "def load_base(settings):\n    os.kill(os.getpid(), signal.SIGINT)\n"
    prelude += "    return load(settings)\nrun.load_base = load_base\n"
    done = command.run("--method", "lora", "--out", "run", prelude=prelude)
    assert done.returncode == 130
    assert done.stderr == "stopped before lora began; --resume continues\n"
    assert not (command.folder / "run").exists()


def test_signal_in_an_evaluation(command: Command) -> None:
    prelude = "import os, signal\nfrom qlora_kernels.finetune import loop, run\n"
    prelude += "evaluate = run.evaluate\ndef interrupted(job, stop):\n"
    prelude += "    if job.progress.step == 6:\n        os.kill(os.getpid(), signal.SIGINT)\n"
    prelude += "    return evaluate(job, stop)\nrun.evaluate = interrupted\n"
    options = ("--method", "lora", "--out", "run")
    done = command.run(*options, prelude=prelude)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert not (command.folder / "run" / "report.json").exists()
    assert command.here(*options, "--resume") == 0
    assert command.here(*options[:-1], "whole") == 0
    assert losses(command.folder / "run", "lora") == losses(command.folder / "whole", "lora")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text, and in `run` a run stopped after step 4 of 6."""
    folder = tmp_path_factory.mktemp("stopped")
    command = Command(folder, write_corpus(folder / "corpus.txt"))
    prelude = DIE + KILL_POINTS["written and not yet renamed"]
    done: subprocess.CompletedProcess[str] = command.run(
        "--method", "lora", "--out", "run", prelude=prelude
    )
    assert done.returncode == -signal.SIGKILL
    assert step_of(folder / "run") == 4
    return folder


@pytest.fixture
def resumable(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command in a copy of `stopped`, whose text and run are `corpus.txt` and `run`."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    monkeypatch.chdir(folder)
    return Command(folder, stopped / "corpus.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "8"), "--steps is 6 there and 8 here"),
        (("--lr", "0.5"), f"--lr is {EMBEDDED.adapter_lr} there and 0.5 here"),
        (("--seed", "3"), "--seed is 0 there and 3 here"),
        (("--rank", "4"), f"--rank is {EMBEDDED.rank} there and 4 here"),
        (("--method", "qlora"), "--method is lora there and qlora here"),
        (("--targets", "q_proj"), "--targets is ['all-linear'] there"),
    ],
)
def test_resume_with_other_options_is_refused(
    options: tuple[str, ...],
    words: str,
    resumable: Command,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(resumable.folder / "run")
    assert resumable.here("--method", "lora", "--out", "run", *options, "--resume") == 2
    err = capfd.readouterr().err
    assert words in err and err.count("\n") == 1
    assert snapshot(resumable.folder / "run") == before


def test_resume_with_another_text_is_refused(
    stopped: Path, resumable: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = stopped / "corpus.txt"
    original = corpus.read_text()
    before = snapshot(resumable.folder / "run")
    try:
        corpus.write_text(original.replace("return", "yield "))
        assert resumable.here("--method", "lora", "--out", "run", "--resume") == 1
    finally:
        corpus.write_text(original)
    assert "the text is" in capfd.readouterr().err
    assert snapshot(resumable.folder / "run") == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    path.write_bytes((path.parent.parent / "corpus.txt").read_bytes())


def other_tensors(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, empty, flip, foreign, other_tensors, folder])
def test_damaged_checkpoint_is_refused_and_kept(
    damage: Callable[[Path], None], resumable: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    run = resumable.folder / "run"
    damage(run / "checkpoint.safetensors")
    before = snapshot(run)
    assert resumable.here("--method", "lora", "--out", "run", "--resume") == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "checkpoint.safetensors" in err
    assert snapshot(run) == before


def test_checkpoint_of_another_model_is_refused(resumable: Command) -> None:
    """Same options, other shapes: what a changed model of the same name would be."""
    saved = load_checkpoint(resumable.folder / "run" / "checkpoint.safetensors")
    model = torch.nn.Linear(3, 3)
    optimizer = make_optimizer(model.parameters(), "adamw", 1e-3, torch.device("cpu"))
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match="does not fit the model at weight"):
        saved.restore(model, optimizer)
    assert torch.equal(model.weight, before)


def test_resume_of_a_finished_run_shows_it_again(
    resumable: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "lora", "--out", "run", "--resume")
    assert resumable.here(*options) == 0
    table = capfd.readouterr().out
    before = snapshot(resumable.folder / "run")
    assert resumable.here(*options) == 0
    out, err = capfd.readouterr()
    assert out == table and "already finished" in err
    assert snapshot(resumable.folder / "run") == before


def test_resume_starts_where_nothing_is(command: Command) -> None:
    assert command.here("--method", "lora", "--out", "new", "--resume") == 0
    assert len(losses(command.folder / "new", "lora")[0]) == 6
