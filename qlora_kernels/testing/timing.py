"""Interleaved timing: competitors take turns, so that whatever disturbs the machine disturbs all.

A ratio is the median of the per-round ratios, not the ratio of two medians: the two times of one
round were taken within milliseconds of each other.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")

# More than any cache that one machine of this library's users is likely to have to itself.
ROTATED_BYTES = 128 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Minimum in seconds."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: the share by which half of the rounds disagree."""
        if len(self.seconds) < 4:
            return float("nan")
        lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return (upper - lower) / self.median

    def ratio_to(self, other: Timing) -> float:
        """Median over the rounds of this time over the other's; below 1 means this is faster."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def time_interleaved(
    callables: Mapping[str, Callable[[int], object]],
    *,
    rounds: int = 40,
    seconds: float = 8.0,
    warmup: int = 2,
    before: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time each callable once per round, in turn.

    Args:
        callables: name -> function of the round's number, which picks the rotated operands.
        rounds: most rounds.
        seconds: no further round starts once this much time has been spent; at least 5 are run.
        warmup: rounds that are run and not counted.
        before: called before each call, outside the measured time.

    Returns:
        name -> Timing, all of the same length.
    """
    times: dict[str, list[float]] = {name: [] for name in callables}
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for i in range(warmup + rounds):
            for name, function in callables.items():
                if before is not None:
                    before()
                start = time.perf_counter()
                function(i)
                stop = time.perf_counter()
                if i >= warmup:
                    times[name].append(stop - start)
            if i >= warmup + 4 and time.perf_counter() - began > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in times.items()}


def release_free_memory() -> None:
    """Give what the C heap holds free back to the system, so that a fresh tensor has fresh pages.

    Without it the time of an allocation depends on what was freed before. Does nothing where the
    C library has no malloc_trim (it is glibc's).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Rotation(Generic[Item]):
    """Copies of an operand, handed out in turn, so that no call finds its own in a cache.

    Args:
        make: index -> a fresh copy.
        nbytes: bytes of one copy.
        total: least bytes of all copies together.
    """

    def __init__(
        self, make: Callable[[int], Item], nbytes: int, total: int = ROTATED_BYTES
    ) -> None:
        count = max(2, math.ceil((total + 1) / max(nbytes, 1)))
        self.items = [make(i) for i in range(count)]

    def __getitem__(self, i: int) -> Item:
        return self.items[i % len(self.items)]
