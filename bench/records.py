"""Rows, the table, and the JSON record of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.machine import machine_record
from qlora_kernels.files import write_text
from qlora_kernels.testing.timing import Timing

RESULTS = Path(__file__).resolve().parent / "results"


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


class AnyRow(Protocol):
    """A comparison with a peer, of times or of bytes."""

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached; None without a target."""

    def cells(self) -> list[str]:
        """The row of the table."""

    def record(self) -> dict[str, object]:
        """The row of the JSON record."""


@dataclass(frozen=True)
class Row:
    """One comparison of times.

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
            milliseconds(self.ours),
            self.peer,
            milliseconds(self.theirs),
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
            "ours_ms": statistics_ms(self.ours),
            "peer_ms": statistics_ms(self.theirs),
            "ratio": round(self.ratio, 4),
            "at_most": self.at_most,
            "times_faster": self.times_faster,
            "passed": self.passed,
            "note": self.note,
        }


@dataclass(frozen=True)
class BytesRow:
    """One comparison of memory.

    Attributes:
        work, peer: as `Row`'s.
        ours, theirs: bytes.
        at_most: the ratio ours / theirs must not be above this.
        note: see `Row`.
    """

    work: str
    peer: str
    ours: int
    theirs: int
    at_most: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours over theirs."""
        return self.ours / self.theirs if self.theirs else float("inf")

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        return None if self.at_most is None else self.ours <= self.at_most * self.theirs

    def cells(self) -> list[str]:
        """The row of the table."""
        target = "-" if self.at_most is None else f"<= {self.at_most:g}x"
        verdict = {True: "pass", False: "MISS", None: "-"}[self.passed]
        ours, theirs = mebibytes(self.ours), mebibytes(self.theirs)
        shown = f"{self.ratio:.3f}x the bytes"
        return [self.work, ours, self.peer, theirs, shown, target, verdict, self.note]

    def record(self) -> dict[str, object]:
        """The row of the JSON record."""
        return {
            "work": self.work,
            "peer": self.peer,
            "ours_bytes": self.ours,
            "peer_bytes": self.theirs,
            "ratio": round(self.ratio, 4),
            "at_most": self.at_most,
            "times_faster": None,
            "passed": self.passed,
            "note": self.note,
        }


def milliseconds(timing: Timing) -> str:
    """A time for people; ± is half the interquartile range."""
    return f"{timing.median * 1e3:.3f} ±{timing.spread * 50:.0f}%"


def mebibytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**20:.2f} MiB"


def statistics_ms(timing: Timing) -> dict[str, float]:
    """A time for a record, in milliseconds; the spread is the interquartile range / median."""
    return {
        "median": round(timing.median * 1e3, 5),
        "minimum": round(timing.minimum * 1e3, 5),
        "spread": round(timing.spread, 4),
        "rounds": len(timing.seconds),
    }


def table(rows: Sequence[AnyRow]) -> str:
    """The rows as a Markdown table; times in ms, ± is half the interquartile range."""
    head = ["work", "ours", "peer", "peer's", "measured", "must reach", "", "note"]
    return markdown([head, *(row.cells() for row in rows)])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a head and its rows, columns aligned."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a record, whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def write_record(case: str, rows: Sequence[AnyRow], settings: Settings, folder: Path) -> Path:
    """Write one case's record; returns its path."""
    record = {
        "machine": machine_record(settings.threads),
        "rows": [row.record() for row in rows],
    }
    return write_json(folder / f"{case}.json", record)
