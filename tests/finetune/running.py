"""What the tests of `finetune` share: a small text, short runs, and the command in a process."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qlora_kernels import cli
from qlora_kernels.finetune.python_text import documentation

ROOT = Path(__file__).resolve().parents[2]
# Where processes find a sitecustomize.py that saves a second of their start.
QUICK_START = Path(__file__).resolve().parent / "quick_start"
# It reads the whole library, and gives the same every time.
documentation_once = functools.cache(documentation)
# A run of seconds: few steps of few tokens.
SHORT = ("--steps", "6", "--batch", "2", "--seq-len", "32", "--checkpoint-every", "2")


def write_corpus(path: Path) -> Path:
    """Text of a few thousand bytes, enough for windows of 33 in both splits."""
    lines = [f"def f{n}(x):\n    return x * {n} + {n * n}\n" for n in range(150)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def slow_steps(seconds: float) -> str:
    """Code that makes steps of training take that much longer."""
    return f"""
import time
from qlora_kernels.finetune import loop
train_step = loop.train_step
def slow_step(job, step):
    time.sleep({seconds})
    return train_step(job, step)
loop.train_step = slow_step
"""


# Code: the handlers of `interrupt` are for one signal, and take themselves away when it comes.
UNTIL_ASKED = """
import signal, time
def wait_until_asked():
    numbers, end = (signal.SIGINT, signal.SIGTERM), time.monotonic() + 240
    while all(signal.getsignal(n) is not signal.SIG_DFL for n in numbers):
        assert time.monotonic() < end
        time.sleep(0.005)
"""


def waiting_steps(after: int, method: str) -> str:
    """Code that has that method's training wait at step `after` for SIGINT or SIGTERM (or death),
    so that a test meets the run there however busy the machine is."""
    return f"""{UNTIL_ASKED}
from qlora_kernels.finetune import loop
train_step = loop.train_step
def waiting_step(job, step):
    if step == {after} and job.settings.method == {method!r}:
        wait_until_asked()
    return train_step(job, step)
loop.train_step = waiting_step
"""


class Command:
    """`python -m qlora_kernels finetune` with a small text and short runs, in ``folder``.

    ``before`` are arguments that come before the command's name.
    """

    def __init__(self, folder: Path, corpus: Path, before: Sequence[str] = ()) -> None:
        self.folder, self.before = folder, before
        self.options = ("--data", str(corpus), *SHORT)

    def arguments(self, options: Sequence[str]) -> list[str]:
        """Later options win, so a test may give any of them anew."""
        return [*self.before, "finetune", *self.options, *options]

    def start(self, *options: str, prelude: str = "") -> subprocess.Popen[str]:
        """The command in a process; ``prelude`` is Python code that it runs first."""
        arguments = self.arguments(options)
        if prelude:
            program = f"{prelude}\nimport sys\nfrom qlora_kernels import cli\n"
            how = ["-c", f"{program}sys.exit(cli.main({arguments!r}))"]
        else:
            how = ["-m", "qlora_kernels", *arguments]
        given = os.environ.get("PYTHONPATH")
        path = os.pathsep.join(filter(None, (str(QUICK_START), str(ROOT), given)))
        return subprocess.Popen(
            [sys.executable, *how],
            cwd=self.folder,
            # Waiting threads must not keep the cores from the other processes of a test.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *options: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
        """The command in a process, to its end."""
        process = self.start(*options, prelude=prelude)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def here(self, *options: str) -> int:
        """The command in this process: its exit status."""
        try:
            return cli.main(self.arguments(options))
        except SystemExit as ended:  # argparse
            assert isinstance(ended.code, int)
            return ended.code


def losses(out: Path, method: str) -> tuple[list[float], float, float]:
    """Everything a run measured of its model."""
    found = json.loads((out / "report.json").read_text())["methods"][method]
    return found["train_losses"], found["eval_loss_before"], found["eval_loss_after"]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Name and content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Poll until ``condition`` holds; fails if the process ends before."""
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended too early: {process.communicate()}")
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> tuple[str, str]:
    """Send a signal and wait for the end; what the process had written."""
    process.send_signal(number)
    return process.communicate(timeout=120)
