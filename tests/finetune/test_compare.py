"""The comparison: three processes, one table, and signals and deaths that reach the right one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from qlora_kernels.finetune.compare import failure
from tests.finetune.running import (
    UNTIL_ASKED,
    Command,
    kill,
    losses,
    wait_for,
    waiting_steps,
    write_corpus,
)

pytestmark = pytest.mark.slow

# nf4 under a name that only a file of the user's own knows, which every process has to run.
DEFINITION = """
import dataclasses
import qlora_kernels.formats as F
@F.register("twin")
def twin():
    return dataclasses.replace(F.get_format("nf4"), name="twin")
"""
# What every process of a comparison runs first where this file is: only there can its methods be
# made to wait for a test.
SLOW = "slow.py"
DEFINITION += f"""
from pathlib import Path
if Path("{SLOW}").exists():
    exec(Path("{SLOW}").read_text())
"""
# fp32: an adapter of zeros then changes no bit of what full fine-tuning starts from.
OPTIONS = ("--dropout", "0.1", "--dtype", "float32")
COMPARE = ("--method", "compare", "--format", "twin", *OPTIONS, "--out", "run")
METHODS = ("full", "lora", "qlora")


# The process of a method has its handlers by then, and has not begun.
WORKER_WAITS = f"""{UNTIL_ASKED}
import sys
if sys.modules["__main__"].__spec__.name.endswith(".worker"):
    wait_until_asked()
"""


def command_of(folder: Path, source: Path | None = None) -> Command:
    """The command in `folder` with the text and the format of `source`, else with new ones."""
    files = source or folder
    if source is None:
        write_corpus(files / "corpus.txt")
        (files / "twin.py").write_text(DEFINITION)
    return Command(folder, files / "corpus.txt", ("--define", str(files / "twin.py")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted comparison, with what it printed in out.txt and err.txt."""
    folder = tmp_path_factory.mktemp("whole")
    done = command_of(folder).run(*COMPARE)
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout)
    (folder / "err.txt").write_text(done.stderr)
    return folder


@pytest.fixture
def same(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command with the text of `whole`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return command_of(tmp_path, whole)


def assert_same_results(whole: Path, run: Path) -> None:
    for method in METHODS:
        assert losses(run, method) == losses(whole / "run", method)


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def test_table_has_every_quantity(whole: Path) -> None:
    lines = (whole / "out.txt").read_text().splitlines()
    assert lines[0].split() == list(METHODS)
    rows = {line[:22].strip(): line[22:].split() for line in lines[1:11]}
    assert list(rows) == [
        "trained parameters",
        "share of all",
        "base weights",
        "bits per parameter",
        "where quantized",
        "peak memory",
        "tokens/s",
        "held-out loss before",
        "held-out loss after",
        "gain recovered",
    ]
    report = json.loads((whole / "run" / "report.json").read_text())["methods"]
    for row, key in (("held-out loss before", "before"), ("held-out loss after", "after")):
        assert rows[row] == [f"{report[method][f'eval_loss_{key}']:.4f}" for method in METHODS]
    assert rows["gain recovered"][0:2] == ["100.0", "%"]


def test_piped_output_is_plain_lines(whole: Path) -> None:
    err = (whole / "err.txt").read_text()
    assert "\r" not in err and "\x1b" not in err
    assert all(line.split(":")[0] in METHODS for line in err.splitlines())
    assert "qlora: step 6 of 6, loss " in err


def test_report_is_that_of_the_methods(whole: Path) -> None:
    report = json.loads((whole / "run" / "report.json").read_text())
    assert report["command"] == "compare" and list(report["methods"]) == list(METHODS)
    base = report["methods"]["full"]["eval_loss_before"]
    gain = base - report["methods"]["full"]["eval_loss_after"]
    for method, values in report["methods"].items():
        alone = json.loads((whole / "run" / method / "report.json").read_text())
        assert {**alone["methods"][method], "gain_recovered": values["gain_recovered"]} == values
        recovered = (base - values["eval_loss_after"]) / gain
        assert values["gain_recovered"] == pytest.approx(recovered)
    assert report["methods"]["lora"]["eval_loss_before"] == base
    assert len({values["text"] for values in report["methods"].values()}) == 1
    for name in ("report.md", "loss.png", "memory.png"):
        assert (whole / "run" / name).stat().st_size > 500
    for name in ("lora/adapter_model.safetensors", "full/model.safetensors"):
        assert (whole / "run" / name).exists()


def test_comparison_equals_single_runs(whole: Path, same: Command) -> None:
    """Another process, another order, the format by its own name, and the same numbers."""
    same.before = ()
    for method in METHODS:
        assert same.here("--method", method, *OPTIONS, "--out", method) == 0
        assert losses(same.folder / method, method) == losses(whole / "run", method)


def test_signal_reaches_the_method(whole: Path, same: Command) -> None:
    """Sent to the parent alone, while the second method trains."""
    (same.folder / SLOW).write_text(waiting_steps(2, "lora"))
    process = same.start(*COMPARE, "--checkpoint-every", "1000")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("lora: step 2"):
            break
    worker = children(process)
    _, err = kill(process, signal.SIGTERM)
    assert process.returncode == 143
    assert "Traceback" not in err and "--resume continues" in err.splitlines()[-1]
    assert len(worker) == 1 and not worker[0].is_running()
    run = same.folder / "run"
    assert (run / "qlora" / "report.json").exists() and not (run / "report.json").exists()
    assert (run / "lora" / "checkpoint.safetensors").exists()
    assert not (run / "full").exists()
    (same.folder / SLOW).unlink()
    before = (run / "qlora" / "report.json").stat().st_mtime_ns
    done = same.run(*COMPARE, "--resume")
    assert done.returncode == 0, done.stderr
    assert "qlora: already finished" in done.stderr
    assert "lora: continuing after step" in done.stderr
    assert (run / "qlora" / "report.json").stat().st_mtime_ns == before
    assert_same_results(whole, run)


def test_ctrl_c_in_a_terminal(same: Command) -> None:
    """A terminal sends SIGINT to the whole foreground group; the method must get it once."""
    (same.folder / SLOW).write_text(waiting_steps(1, "qlora"))
    process = same.start(*COMPARE, prelude="import os; os.setpgrp()")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("qlora: step 1 "):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err and "saved in run/qlora; --resume continues" in err
    assert (same.folder / "run" / "qlora" / "checkpoint.safetensors").exists()


def test_signal_while_the_method_is_starting(same: Command) -> None:
    """Before it has handlers: it waits for them instead of ending it in an import."""
    (same.folder / SLOW).write_text(WORKER_WAITS)
    process = same.start(*COMPARE)
    wait_for(lambda: bool(children(process)), process)
    _, err = kill(process, signal.SIGINT)
    assert process.returncode == 130
    assert err == "stopped before qlora began; --resume continues\n"
    assert not (same.folder / "run").exists()


def test_method_dies_with_its_parent(same: Command) -> None:
    process = same.start(*COMPARE, "--checkpoint-every", "1", "--steps", "1000")
    checkpoint = same.folder / "run" / "qlora" / "checkpoint.safetensors"
    wait_for(checkpoint.exists, process)
    (worker,) = children(process)
    process.kill()
    process.wait()
    worker.wait(timeout=20)
    # Closing the pipes now cannot be what ended it.
    process.communicate()
    assert not (same.folder / "run" / "report.json").exists()


def test_method_that_is_killed_is_named(same: Command) -> None:
    process = same.start(*COMPARE, "--steps", "1000")
    checkpoint = same.folder / "run" / "qlora" / "checkpoint.safetensors"
    wait_for(checkpoint.exists, process)
    children(process)[0].kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 137
    assert "qlora was killed by SIGKILL, perhaps for lack of memory" in err.splitlines()[-1]


def test_failure_of_a_method_is_told_once() -> None:
    assert (str(failure("lora", 2)), failure("lora", 2).exit_code) == ("", 2)
    assert failure("lora", -11).exit_code == 139
    assert "SIGSEGV" in str(failure("lora", -11))


def test_damaged_checkpoint_of_one_method(whole: Path, same: Command) -> None:
    shutil.copytree(whole / "run", same.folder / "run")
    checkpoint = same.folder / "run" / "qlora" / "checkpoint.safetensors"
    content = bytearray(checkpoint.read_bytes())
    content[-10] ^= 255
    checkpoint.write_bytes(content)
    done = same.run(*COMPARE, "--resume")
    assert done.returncode == 1
    assert "qlora/checkpoint.safetensors is damaged" in done.stderr.splitlines()[-1]
    assert checkpoint.read_bytes() == bytes(content)
    table = (same.folder / "run" / "report.json").read_bytes()
    assert table == (whole / "run" / "report.json").read_bytes()
