"""The output folder: what a run leaves in it, whose files are already there, and one run at a time.

A run never replaces what it did not make. Files under a run's own names are replaced only by the
same run: by `--resume`, or by the same command again once it has finished.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

from qlora_kernels.errors import ArgumentError, CheckpointError, QLKError, argument_error
from qlora_kernels.finetune.checkpoint import CHECKPOINT, difference, load_header
from qlora_kernels.finetune.settings import Settings
from qlora_kernels.nn.adapter_parts import CONFIG_NAME, WEIGHTS_NAME

REPORT, REPORT_TEXT = "report.json", "report.md"
LOSS_PLOT, MEMORY_PLOT = "loss.png", "memory.png"
# What full fine-tuning trained: one file for the embedded model, transformers' folder for others.
MODEL, MODEL_FOLDER = "model.safetensors", "model"
OWN_NAMES = (
    CHECKPOINT,
    CONFIG_NAME,
    WEIGHTS_NAME,
    MODEL,
    MODEL_FOLDER,
    REPORT,
    REPORT_TEXT,
    LOSS_PLOT,
    MEMORY_PLOT,
)
REPORT_KIND = "qlora_kernels.finetune.report/1"
DEFAULT_OUT = Path("out") / "finetune"


class State(Enum):
    """How far the run that is asked for has come in a folder."""

    NEW = "nothing of a run is there"
    UNFINISHED = "this run, unfinished"
    FINISHED = "this run, finished"


class OtherRunError(ArgumentError):
    """A folder holds a run with other options."""


def choose_out(given: Path | None, resume: bool, state_of: Callable[[Path], State]) -> Path:
    """The folder to write to: ``given``, else the first of out/finetune, out/finetune-2, … that
    does not hold a run with other options.

    Raises:
        ArgumentError: it holds files that are not this run's, or without ``resume`` this run
            unfinished.
        CheckpointError: a file there is truncated or foreign.
    """
    if given is not None:
        check_state(given, state_of(given), resume)
        return given
    for number in count(1):
        out = DEFAULT_OUT if number == 1 else DEFAULT_OUT.with_name(f"{DEFAULT_OUT.name}-{number}")
        try:
            state = state_of(out)
        except OtherRunError:
            continue
        check_state(out, state, resume)
        return out
    raise AssertionError("count() does not end")


def check_state(out: Path, state: State, resume: bool) -> None:
    """Raises ArgumentError for an unfinished run that is not to be resumed."""
    if state is State.UNFINISHED and not resume:
        raise argument_error(
            "finetune",
            "--out",
            "a folder without an unfinished run",
            f"{out}; continue that run with --resume, choose another folder, or delete this one",
        )


def method_state(settings: Settings) -> State:
    """The state of ``settings.out`` for a run of one method.

    Raises:
        OtherRunError: a run with other options is there.
        ArgumentError: not a folder, or files with a run's names but no run.
        CheckpointError: the checkpoint or the report there is truncated or foreign.
    """
    out = settings.out
    names = own_names(out)
    if not names:
        return State.NEW
    wanted = settings.compared_on_resume()
    report = read_report(out / REPORT) if REPORT in names else None
    if report is not None:
        check_report(report, out, settings.method, {settings.method: wanted})
    if CHECKPOINT in names:
        saved = load_header(out / CHECKPOINT)
        check_same(saved.identity, wanted, out)
        return State.FINISHED if saved.is_finished and report is not None else State.UNFINISHED
    if report is None:
        refuse(out, names)
    return State.FINISHED


def comparison_state(out: Path, runs: Sequence[Settings]) -> State:
    """The state of ``out`` for a comparison of ``runs``, each in a folder of its own below it.

    Raises as `method_state`.
    """
    names = own_names(out)
    report = read_report(out / REPORT) if REPORT in names else None
    if report is not None:
        wanted = {run.method: run.compared_on_resume() for run in runs}
        check_report(report, out, "compare", wanted)
    elif CHECKPOINT in names:
        load_header(out / CHECKPOINT)  # damage is reported as such
        raise OtherRunError(f"finetune: --out must be without another run, got {out}, a single one")
    elif names:
        refuse(out, names)
    states = {method_state(run) for run in runs}
    if report is None and states == {State.NEW}:
        return State.NEW
    return State.FINISHED if report and states == {State.FINISHED} else State.UNFINISHED


def own_names(out: Path) -> list[str]:
    """Names in ``out`` that a run would write. Raises ArgumentError where it is no folder."""
    if os.path.lexists(out) and not out.is_dir():
        raise argument_error("finetune", "--out", "a folder", f"{out}, which is a file")
    return [name for name in OWN_NAMES if os.path.lexists(out / name)]


def refuse(out: Path, names: Sequence[str]) -> None:
    """Raises ArgumentError for files that no run is known to have made."""
    raise argument_error(
        "finetune",
        "--out",
        "a folder without files that the run would replace",
        f"{out}, which holds {', '.join(names)}",
    )


def check_same(saved: Mapping[str, object], wanted: Mapping[str, object], out: Path) -> None:
    """Raises OtherRunError naming the first option that differs."""
    found = difference(saved, wanted)
    if found is not None:
        raise OtherRunError(
            f"finetune: --out must be without another run, got {out}, where {found}; choose "
            "another folder, or delete this one"
        )


def check_report(
    report: Mapping[str, Any], out: Path, command: str, wanted: Mapping[str, Mapping[str, object]]
) -> None:
    """Raises OtherRunError unless ``report`` is that of ``command`` with the ``wanted`` options."""
    check_same({"method": report["command"]}, {"method": command}, out)
    for method, options in wanted.items():
        check_same(report["methods"].get(method, {}).get("settings", {}), options, out)


def read_report(path: Path) -> dict[str, Any]:
    """A report.json. Raises CheckpointError for one that is not of this program."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"finetune: {path} is truncated or foreign ({error})") from error
    if not isinstance(report, dict) or report.get("kind") != REPORT_KIND:
        raise CheckpointError(f"finetune: {path} is not a report of this program")
    return report


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Within, ``out`` exists and this process alone writes to it. A folder that was made here and
    stayed empty goes again.

    Raises:
        QLKError: another process is writing to it.
        OSError: it cannot be made.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        lock(handle, out)
        yield
    finally:
        os.close(handle)
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def lock(handle: int, out: Path) -> None:
    """Lock an open folder until its handle closes, however the process ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise QLKError(f"finetune: another process is writing to {out}") from error
    except OSError:
        return  # some network file systems lock no folders


def remove_leftovers(out: Path) -> None:
    """Remove what a killed run left half written: temporary files of `files.write_atomically` and
    folders of `run.replace_folder`."""
    for name in OWN_NAMES:
        for path in out.glob(f".{name}.*.tmp"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an OSError becomes a QLKError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise QLKError(
            f"finetune: cannot write {path} ({error.strerror or error}); what was there before is "
            "unchanged"
        ) from error
