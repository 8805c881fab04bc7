"""Rows, the machine they were measured on, the table and the JSON record of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from qlora_kernels.backends.cpu.common import ISA_NAMES, machine_isa
from qlora_kernels.testing.timing import Timing

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("bitsandbytes", "torchao", "numpy")


@dataclass(frozen=True)
class Settings:
    """How long and on how many threads to measure.

    Attributes:
        threads: torch's intra-op threads.
        rounds: most rounds of a comparison.
        seconds: time after which a comparison starts no further round.
    """

    threads: int = 2
    rounds: int = 60
    seconds: float = 10.0


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        work: what was done.
        peer: what it is compared with.
        ours, theirs: the times of the two, measured in turn.
        at_most: the ratio ours / theirs must not be above this.
        times_faster: the ratio theirs / ours must not be below this.
        note: a figure worth printing beside the row, e.g. GB/s.
    """

    work: str
    peer: str
    ours: Timing
    theirs: Timing
    at_most: float | None = None
    times_faster: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours over theirs, the median over the rounds."""
        return self.ours.ratio_to(self.theirs)

    @property
    def speedup(self) -> float:
        """Theirs over ours, the median over the rounds."""
        return self.theirs.ratio_to(self.ours)

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if self.at_most is not None:
            return self.ratio <= self.at_most
        if self.times_faster is not None:
            return self.speedup >= self.times_faster
        return None

    def cells(self) -> list[str]:
        """The row of the table."""
        if self.at_most is not None:
            shown, target = f"{self.ratio:.2f}x the time", f"<= {self.at_most:g}x"
        else:
            shown = f"{self.speedup:.2f}x faster"
            target = f">= {self.times_faster:g}x" if self.times_faster is not None else "-"
        verdict = {True: "pass", False: "MISS", None: "-"}[self.passed]
        return [
            self.work,
            _milliseconds(self.ours),
            self.peer,
            _milliseconds(self.theirs),
            shown,
            target,
            verdict,
            self.note,
        ]

    def record(self) -> dict[str, object]:
        """The row of the JSON record; times in milliseconds."""
        return {
            "work": self.work,
            "peer": self.peer,
            "ours_ms": _statistics(self.ours),
            "peer_ms": _statistics(self.theirs),
            "ratio": round(self.ratio, 4),
            "at_most": self.at_most,
            "times_faster": self.times_faster,
            "passed": self.passed,
            "note": self.note,
        }


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f} ±{timing.spread * 50:.0f}%"


def _statistics(timing: Timing) -> dict[str, float]:
    return {
        "median": round(timing.median * 1e3, 5),
        "minimum": round(timing.minimum * 1e3, 5),
        "spread": round(timing.spread, 4),
        "rounds": len(timing.seconds),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; ± is half the interquartile range."""
    head = ["work", "ms", "peer", "peer ms", "measured", "must reach", "", "note"]
    lines = [head, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def cpu_name() -> str:
    """The model name that the kernel reports, e.g. "Intel(R) Xeon(R) Processor"."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def machine_record(settings: Settings) -> dict[str, object]:
    """Everything about the machine and the software that a time depends on."""
    versions = {name: _version(name) for name in ("torch", "qlora_kernels", *PEERS)}
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": ISA_NAMES[machine_isa()] if machine_isa() >= 0 else "no native library",
        "threads": settings.threads,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that was measured, with "+changes" if the working tree differs from it."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", "..")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=where, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def machine_slug() -> str:
    """A folder name for the machine: CPU, cores and instruction set."""
    isa = ISA_NAMES[machine_isa()] if machine_isa() >= 0 else "reference"
    name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", cpu_name(), flags=re.IGNORECASE)
    words = [*name.split(), f"{os.cpu_count()}-cores", isa]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


def write_record(case: str, rows: Sequence[Row], settings: Settings, folder: Path) -> Path:
    """Write one case's record, atomically; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case}.json"
    record = {"machine": machine_record(settings), "rows": [row.record() for row in rows]}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
