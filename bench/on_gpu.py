"""`python -m bench.on_gpu --out DIR --minutes N`: everything that a GPU machine should run.

Stages run in the order of their worth, each in a process of its own: one that crashes or hangs
costs only itself. Results are on disk as soon as they are known, DIR/<stage>.json; what is done is
not run again when the command is repeated, what was interrupted goes on where it was, and
DIR/summary.json tells how each ended. Time that a stage leaves goes to those after it.

    python -m bench.on_gpu --out bench/results/h200 --minutes 25
    python -m bench.on_gpu --out bench/results/h200 --minutes 10 --only decode,profile
    python -m bench.on_gpu --out /tmp/try --minutes 5 --device cpu --smoke

It needs torch and a checkout of this project; every peer, pytest and each of NVIDIA's tools may be
missing, and is named then. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.gpu.context import Context, read_stage, write_stage
from bench.records import write_json

ROOT = Path(__file__).resolve().parents[1]
# Least seconds that a stage may overstay: it looks at the time between two measurements.
OVERTIME = 30.0
# A stage that overstays longer is asked to end, and killed so many seconds later.
GRACE = 5.0


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of its file.
        function: "module:function" below bench.gpu; takes a Context.
        weight: its share of the time.
        what: for the summary.
    """

    name: str
    function: str
    weight: float
    what: str


STAGES = (
    Stage("environment", "checks:environment", 1, "machine, driver, versions, what is missing"),
    Stage("tests", "checks:tests", 6, "pytest -m gpu"),
    Stage("sanitizer", "checks:sanitizer", 4, "compute-sanitizer over every op"),
    Stage("poison", "checks:poison", 1, "every op with outputs full of NaN before"),
    Stage("random", "checks:random_problems", 4, "10,000 random problems against fp64"),
    Stage("table", "table:targets", 8, "the targets' table, each backend beside its peers"),
    Stage("layer", "table:layers", 4, "a LoRA layer, forward + backward, 2k to 16k tokens"),
    Stage("training", "training:steps", 6, "a Llama-8B-shaped training step"),
    Stage("sixty_five", "large:models", 6, "65B on one card, and its smaller relatives"),
    Stage("decode", "decode:tokens", 3, "Llama-8B-shaped decoding with an adapter"),
    Stage("profile", "profiles:profiles", 2, "profiles of the slowest kernels"),
)
NAMES = tuple(stage.name for stage in STAGES)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, required=True, help="for all stages together")
    parser.add_argument("--only", help=f"comma-separated, out of: {', '.join(NAMES)}")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: tests the stages")
    parser.add_argument("--stage", choices=NAMES, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, or the one of a child process; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    unknown = sorted(set((options.only or "").split(",")) - {"", *NAMES})
    if unknown:
        parser.error(f"argument --only must be out of {', '.join(NAMES)}, got {unknown}")
    if options.stage:
        return run_here(options)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return run_all(options)


def run_here(options: argparse.Namespace) -> int:
    """In a child: one stage, its exception turned into a record."""
    stage = next(s for s in STAGES if s.name == options.stage)
    before = read_stage(options.out, stage.name) if not options.again else None
    context = Context(
        stage.name,
        torch.device(options.device),
        options.smoke,
        options.out,
        options.minutes * 60,
        dict(before["content"]) if before else {},
    )
    module, _, function = stage.function.partition(":")
    try:
        getattr(import_module(f"bench.gpu.{module}"), function)(context)
    except BaseException as error:
        used = context.seconds - context.left
        text = "".join(traceback.format_exception(error))[-4000:]
        write_stage(options.out, stage.name, "failed", context.content, used, text)
        raise
    used = context.seconds - context.left
    write_stage(options.out, stage.name, "done", context.content, used)
    return 0


def run_all(options: argparse.Namespace) -> int:
    """Every chosen stage in its child; returns the exit status."""
    chosen = [s for s in STAGES if not options.only or s.name in options.only.split(",")]
    deadline = time.monotonic() + options.minutes * 60
    waiting = []
    for stage in chosen:
        found = read_stage(options.out, stage.name)
        if found and found["status"] == "done" and not options.again:
            print(f"{stage.name}: done before", flush=True)
        else:
            waiting.append(stage)
    while waiting:
        stage = waiting[0]
        left = deadline - time.monotonic()
        budget = left * stage.weight / sum(s.weight for s in waiting)
        if left < 1:
            print(f"out of time before {stage.name}", flush=True)
            break
        print(f"{stage.name}: {stage.what} (at most {budget / 60:.1f} min)", flush=True)
        status = run_child(options, stage, budget)
        print(f"{stage.name}: {status}", flush=True)
        waiting.pop(0)
        write_summary(options.out)
    summary = write_summary(options.out)
    print(summary_text(summary))
    ended = [summary["stages"][stage.name]["status"] for stage in chosen]
    return 1 if "failed" in ended else 0


def run_child(options: argparse.Namespace, stage: Stage, budget: float) -> str:
    """Run a stage in a process of its own and write down how it ended; returns the status."""
    log = options.out / f"{stage.name}.log"
    began = time.monotonic()
    status = "failed"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command_of(options, stage, budget),
            cwd=ROOT,
            # Large models come and go: parts of freed blocks must be usable for others.
            env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            # A stage ends by itself when its time is up; this is for one that hangs.
            code = child.wait(budget + max(OVERTIME, budget / 4))
            reason = f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, reason, status = None, "out of time", "out of time"
        finally:
            end(child)
    if code == 0:
        return "done"
    found = read_stage(options.out, stage.name) or {"content": {}, "error": None}
    # A Python exception is on record already; what kills the process itself is told by its log.
    error = found["error"] or f"{reason}; {tail(log)}"
    used = time.monotonic() - began
    write_stage(options.out, stage.name, status, found["content"], used, error)
    return f"{status}: {error.strip().splitlines()[-1][:200]}"


def command_of(options: argparse.Namespace, stage: Stage, budget: float) -> list[str]:
    """The command line of a stage's process."""
    command = [sys.executable, "-m", "bench.on_gpu", "--stage", stage.name]
    command += ["--out", str(options.out), "--device", options.device]
    command += ["--minutes", repr(budget / 60)]
    return command + [f"--{name}" for name in ("smoke", "again") if getattr(options, name)]


def end(child: subprocess.Popen[bytes]) -> None:
    """End a child and what it started, if it still runs."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        os.killpg(child.pid, sent)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def tail(log: Path, length: int = 1500) -> str:
    """The end of a log."""
    return log.read_bytes()[-length:].decode("utf-8", "replace").strip()


def write_summary(out: Path) -> dict[str, Any]:
    """How each stage ended, on disk and returned."""
    stages = {}
    for stage in STAGES:
        found = read_stage(out, stage.name)
        ended = found or {"status": "not run", "seconds": 0.0, "error": None}
        kept = {key: ended[key] for key in ("status", "seconds", "error")}
        stages[stage.name] = {"what": stage.what, **kept}
    summary = {"stages": stages}
    write_json(out / "summary.json", summary)
    return summary


def summary_text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = []
    for name, stage in summary["stages"].items():
        lines.append(f"{name:<12}{stage['status']:<13}{stage['seconds']:>8.1f} s  {stage['what']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
