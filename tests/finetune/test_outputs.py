"""The output folder: what is in it is never replaced but by the run that made it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from qlora_kernels.finetune.outputs import OWN_NAMES, claimed
from tests.finetune.running import Command, losses, snapshot

QLORA = ("--method", "qlora", "--steps", "2")


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("method", ["lora", "compare"])
def test_files_of_others_are_kept(
    name: str, method: str, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    run = command.folder / "run"
    run.mkdir()
    (run / name).write_text("precious")
    for flags in ((), ("--resume",)):
        assert command.here("--method", method, "--out", "run", *flags) in (1, 2)
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and name in err
        assert snapshot(run) == {name: b"precious"}


def test_other_files_do_not_matter(command: Command) -> None:
    run = command.folder / "run"
    run.mkdir()
    (run / "log.txt").write_text("mine")
    assert command.here(*QLORA, "--out", "run") == 0
    assert (run / "log.txt").read_text() == "mine"


def test_same_command_again_replaces_its_own(command: Command) -> None:
    options = (*QLORA, "--out", "run")
    run = command.folder / "run"
    assert command.here(*options) == 0
    first = losses(run, "qlora")
    (run / "report.md").write_text("stale")
    assert command.here(*options) == 0
    assert losses(run, "qlora") == first
    assert (run / "report.md").read_text().startswith("# Fine-tuning report")


def test_finished_run_with_other_options_is_kept(
    command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.here(*QLORA, "--out", "run") == 0
    before = snapshot(command.folder / "run")
    capfd.readouterr()
    for options in (("--lr", "0.1"), ("--method", "full"), ("--method", "compare")):
        for flags in ((), ("--resume",)):
            assert command.here(*QLORA, "--out", "run", *options, *flags) == 2
            err = capfd.readouterr().err
            assert err.startswith("error: finetune: --out must be without another run, got run")
            assert err.count("\n") == 1
            assert snapshot(command.folder / "run") == before


def test_unfinished_run_wants_resume(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.here(*QLORA, "--out", "run") == 0
    (command.folder / "run" / "report.json").unlink()
    before = snapshot(command.folder / "run")
    capfd.readouterr()
    assert command.here(*QLORA, "--out", "run") == 2
    err = capfd.readouterr().err
    assert "continue that run with --resume" in err and err.count("\n") == 1
    assert snapshot(command.folder / "run") == before
    assert command.here(*QLORA, "--out", "run", "--resume") == 0


def test_default_folder_steps_aside(command: Command) -> None:
    for steps in ("1", "2", "1"):
        assert command.here("--method", "lora", "--steps", steps) == 0
    out = command.folder / "out"
    assert sorted(path.name for path in out.iterdir()) == ["finetune", "finetune-2"]
    assert len(losses(out / "finetune", "lora")[0]) == 1
    assert len(losses(out / "finetune-2", "lora")[0]) == 2
    # What is resumed is the run with these options, wherever it is.
    (out / "finetune-2" / "report.json").unlink()
    assert command.here("--method", "lora", "--steps", "2", "--resume") == 0
    assert len(losses(out / "finetune-2", "lora")[0]) == 2
    assert len(list(out.iterdir())) == 2


def test_default_folder_does_not_step_aside_from_damage(command: Command) -> None:
    assert command.here("--method", "lora", "--steps", "1") == 0
    checkpoint = command.folder / "out" / "finetune" / "checkpoint.safetensors"
    checkpoint.write_bytes(b"damaged")
    assert command.here("--method", "lora", "--steps", "1", "--resume") == 1
    assert [path.name for path in (command.folder / "out").iterdir()] == ["finetune"]


def test_one_process_at_a_time(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    run = command.folder / "run"
    run.mkdir()
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert command.here(*QLORA, "--out", "run") == 1
    assert "another process is writing to run" in capfd.readouterr().err
    os.close(handle)
    assert command.here(*QLORA, "--out", "run") == 0


def test_out_that_cannot_be_made(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.here(*QLORA, "--out", "corpus.txt/run") in (1, 2)
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "corpus.txt" in err


def test_folders_made_in_vain_go_again(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(KeyError), claimed(tmp_path / "kept" / "a" / "b"):
        raise KeyError
    assert list((tmp_path / "kept").iterdir()) == []
    with claimed(tmp_path / "kept" / "a" / "b"):
        (tmp_path / "kept" / "a" / "b" / "file").touch()
    assert (tmp_path / "kept" / "a" / "b" / "file").exists()
    shutil.rmtree(tmp_path / "kept" / "a")
    with claimed(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept").exists()
