"""A disk that fills up: one clear line, and everything that was there before as it was."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_kernels import files
from qlora_kernels.finetune.plots import write_plots
from qlora_kernels.finetune.run import replace_folder
from tests.finetune.running import Command, losses, snapshot, write_corpus

# Files may not grow beyond this: the system then fails the write half way, as a full disk does.
LIMIT = 100_000


@pytest.fixture
def limited() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_file_that_cannot_be_written_whole(
    method: str, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.here("--method", method, "--out", "run") == 1
    out, err = capfd.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: finetune: cannot write run/checkpoint.safetensors (File too")
    assert "Traceback" not in err and out == ""
    assert not (command.folder / "run").exists()


def fill_up(monkeypatch: pytest.MonkeyPatch, name: str, times: int = 1) -> None:
    """Writing the file ``name`` fails from the ``times``-th time on."""
    real, seen = files.os.fsync, []

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.basename(path).startswith(f".{name}."):
            seen.append(path)
            if len(seen) >= times:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)


NAMES = ["checkpoint.safetensors", "adapter_model.safetensors", "adapter_config.json"]
NAMES += ["report.json", "report.md", "loss.png", "memory.png"]


LORA = ("--method", "lora", "--steps", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, plots included."""
    folder = tmp_path_factory.mktemp("finished")
    command = Command(folder, write_corpus(folder / "corpus.txt"))
    with pytest.MonkeyPatch.context() as drawing:
        drawing.setattr("qlora_kernels.finetune.plots.write_plots", write_plots)
        assert command.here(*LORA, "--out", str(folder / "run")) == 0
    return folder / "run"


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_what_could_not_be_written(
    name: str,
    finished: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if name.endswith(".png"):
        pytest.importorskip("matplotlib")
    shutil.copytree(finished, command.folder / "run")
    options = (*LORA, "--out", "run", "--data", str(finished.parent / "corpus.txt"))
    before = snapshot(command.folder / "run")
    fill_up(monkeypatch, name)
    capfd.readouterr()
    assert command.here(*options) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: finetune: cannot write run")
    assert err.splitlines()[-1].endswith(
        "(No space left on device); what was there before is unchanged"
    )
    after = snapshot(command.folder / "run")
    assert set(after) == set(before)
    assert after[name] == before[name]


def test_run_goes_on_once_there_is_space(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--method", "qlora", "--dropout", "0.1", "--out")
    with monkeypatch.context() as filling:
        fill_up(filling, "checkpoint.safetensors", times=2)
        assert command.here(*options, "run") == 1
    assert command.here(*options, "run") == 2  # what is there is unfinished, and was kept
    assert command.here(*options, "run", "--resume") == 0
    assert command.here(*options, "whole") == 0
    run, whole = (losses(command.folder / name, "qlora") for name in ("run", "whole"))
    assert run == whole


def test_folder_of_a_full_model_is_whole_or_absent(tmp_path: Path) -> None:
    class Model:
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def save_pretrained(self, folder: Path) -> None:
            (folder / "weights").write_text("new")
            if self.fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Tokenizer:
        tokenizer = Model(fails=False)

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(OSError, match="No space"):
        replace_folder(folder, Model(fails=True), Tokenizer())
    assert snapshot(tmp_path) == {"model/weights": b"old"}
    replace_folder(folder, Model(fails=False), Tokenizer())
    assert snapshot(tmp_path) == {"model/weights": b"new"}
