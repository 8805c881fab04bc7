"""`bench compare BEFORE AFTER`: which points became slower by more than noise explains.

BEFORE and AFTER are records of `bench.run` or folders of them. A folder's records of one point are
pooled: the median of their medians, and their own disagreement as noise.

The noise model. A round's times scatter about their median with an interquartile range of IQR, so
their standard deviation is about IQR / 1.349 and that of the median of n rounds 1.2533 times as
much over √n. Rounds are neighbours in time and not independent: n counts as 9 at most. Between two
runs the machine differs too, which is seen in the peers, whose code did not change: a point's ratio
after / before is divided by the median ratio of its peers, and their noise added. A change counts
if it is more than three such standard errors and more than --least (5 %).

The exit status is 1 if a point became slower or wrong, 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.records import markdown
from qlora_kernels.errors import argument_error

IQR_OF_SIGMA = 1.349  # interquartile range of a normal distribution, in standard deviations
MEDIAN_OF_MEAN = 1.2533  # standard error of a median over that of a mean: sqrt(pi / 2)
INDEPENDENT_ROUNDS = 9
SIGMAS = 3.0
LEAST_CHANGE = 0.05


@dataclass(frozen=True)
class Estimate:
    """A time and how well it is known.

    Attributes:
        median: in any unit.
        error: standard error over the median.
    """

    median: float
    error: float

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Estimate:
        """Of a record's median, spread (interquartile range / median) and rounds."""
        spread = figures["spread"]
        # Fewer than four rounds have no quartiles: as unsure as a spread of one half.
        spread = 0.5 if spread is None or math.isnan(spread) else spread
        rounds = max(1, min(figures["rounds"], INDEPENDENT_ROUNDS))
        error = MEDIAN_OF_MEAN * spread / IQR_OF_SIGMA / math.sqrt(rounds)
        return cls(figures["median"], error)

    @classmethod
    def pooled(cls, parts: Sequence[Estimate]) -> Estimate:
        """Of several runs: the median; the larger of a run's error and half the runs' range."""
        median = statistics.median(part.median for part in parts)
        apart = (max(p.median for p in parts) - min(p.median for p in parts)) / 2 / median
        return cls(median, max(apart, *(part.error for part in parts)))


@dataclass
class Measured:
    """What records say of one point: of ours, and of its peers by name."""

    ours: list[Estimate] = field(default_factory=list)
    peers: dict[str, list[Estimate]] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One point before and after.

    Attributes:
        key: the point.
        before, after: medians in ms.
        ratio: after / before, with the peers' own change divided out; above 1 is slower.
        drift: the peers' change, 1 without peers.
        noise: standard error of the ratio.
        least: changes below are not told.
    """

    key: str
    before: float
    after: float
    ratio: float
    drift: float
    noise: float
    least: float = LEAST_CHANGE

    @property
    def bound(self) -> float:
        """The change that noise does not explain."""
        return max(self.least, SIGMAS * self.noise)

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "same"."""
        if self.ratio > 1 + self.bound:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.bound) else "same"


def change(key: str, before: Measured, after: Measured, least: float = LEAST_CHANGE) -> Change:
    """Compare one point."""
    ours = [Estimate.pooled(side.ours) for side in (before, after)]
    both = sorted(set(before.peers) & set(after.peers))
    pairs = [[Estimate.pooled(side.peers[name]) for side in (before, after)] for name in both]
    drift = statistics.median([b.median / a.median for a, b in pairs] or [1.0])
    errors = [math.hypot(a.error, b.error) for a, b in pairs]
    of_drift = statistics.median(errors) / math.sqrt(len(errors)) if errors else 0.0
    noise = math.sqrt(ours[0].error ** 2 + ours[1].error ** 2 + of_drift**2)
    ratio = ours[1].median / ours[0].median / drift
    return Change(key, ours[0].median, ours[1].median, ratio, drift, noise, least)


def read_records(path: Path) -> tuple[dict[str, Measured], set[str]]:
    """(point -> what was measured, points that were refused as wrong) of a record or a folder.

    Raises:
        ArgumentError: no such file, or none that is a record.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found: dict[str, Measured] = {}
    refused: set[str] = set()
    for file in files:
        if not file.is_file():
            raise argument_error("compare", "record", "a file or a folder", path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise argument_error("compare", "record", "JSON", f"{file}: {error}") from error
        if isinstance(content, dict):
            _collect(content, found)
            refused |= {point["key"] for point in content.get("refused", ())}
    if not found and not refused:
        raise argument_error("compare", "record", "one of bench.run", path)
    return found, refused


def _collect(content: Mapping[str, Any], found: dict[str, Measured]) -> None:
    for point in content.get("points", ()):
        measured = found.setdefault(point["key"], Measured())
        measured.ours.append(Estimate.of(point["ours_ms"]))
        for name, peer in point["peers_ms"].items():
            if "missing" not in peer and not name.startswith("our"):
                measured.peers.setdefault(name, []).append(Estimate.of(peer))
    for row in content.get("rows", ()):
        if "ours_ms" in row:
            measured = found.setdefault(f"{row['work']} / {row['peer']}", Measured())
            measured.ours.append(Estimate.of(row["ours_ms"]))
            if not row["peer"].startswith(("our", "the same")):
                measured.peers.setdefault(row["peer"], []).append(Estimate.of(row["peer_ms"]))


def compare(
    before: Mapping[str, Measured], after: Mapping[str, Measured], least: float = LEAST_CHANGE
) -> list[Change]:
    """Every point that both sides have, the largest slow-down first."""
    common = [key for key in before if key in after]
    changes = [change(key, before[key], after[key], least) for key in common]
    return sorted(changes, key=lambda c: -c.ratio)


def text_of(changes: Iterable[Change]) -> str:
    """A table for people."""
    head = ["point", "before ms", "after ms", "ratio", "counts above", "peers", "verdict"]
    rows = [
        [
            c.key,
            f"{c.before:.4g}",
            f"{c.after:.4g}",
            f"{c.ratio:.3f}",
            f"{1 + c.bound:.3f}",
            f"{c.drift:.3f}",
            c.verdict if c.verdict == "same" else c.verdict.upper(),
        ]
        for c in changes
    ]
    return markdown([head, *rows])


def report(before: Path, after: Path, least: float = LEAST_CHANGE) -> int:
    """Print the comparison of two paths; returns the exit status."""
    old, wrong_before = read_records(before)
    new, wrong_after = read_records(after)
    changes = compare(old, new, least)
    wrong = sorted(wrong_after - wrong_before)
    if not changes and not wrong:
        print("error: compare: the two have no point in common", file=sys.stderr)
        return 2
    if changes:
        print(text_of(changes))
    slower = sum(c.verdict == "slower" for c in changes)
    faster = sum(c.verdict == "faster" for c in changes)
    print(f"\n{len(changes)} points: {slower} slower, {faster} faster, the others within noise")
    for name, keys in (("before", set(old) - set(new)), ("after", set(new) - set(old))):
        if keys:
            print(f"only {name}: {len(keys)} points, e.g. {min(keys)}")
    for key in wrong:
        print(f"WRONG after: {key}")
    return 1 if slower or wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=LEAST_CHANGE, help="share that counts")
    options = parser.parse_args(arguments)
    try:
        return report(options.before, options.after, options.least)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
