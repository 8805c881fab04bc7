"""Interleaved timing: competitors take turns, so that whatever disturbs the machine disturbs all.

A ratio is the median of the per-round ratios, not the ratio of two medians: the two times of one
round were taken within milliseconds of each other. `clock_for` gives the clock of a device: wall
time on a CPU, replays of CUDA graphs between events on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

Item = TypeVar("Item")
Call = Callable[[int], object]

# More than any cache that one machine of this library's users is likely to have to itself.
ROTATED_BYTES = 128 << 20
# Of a CUDA graph: fewer would time the replay's own start, more take memory for their results.
LEAST_CALLS, MOST_CALLS = 4, 256


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable, one entry per round.

    Attributes:
        seconds: of one call.
        how: "wall clock", "graph replay", or "eager: …" with why no graph could be captured.
    """

    seconds: tuple[float, ...]
    how: str = "wall clock"

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
    callables: Mapping[str, Call],
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
        total: least bytes of all copies together; what is smaller than total / MOST_CALLS stays
            in the caches in part, or making copies would take longer than timing them.
    """

    def __init__(
        self, make: Callable[[int], Item], nbytes: int, total: int = ROTATED_BYTES
    ) -> None:
        count = min(max(2, math.ceil((total + 1) / max(nbytes, 1))), MOST_CALLS)
        self.items = [make(i) for i in range(count)]

    def __getitem__(self, i: int) -> Item:
        return self.items[i % len(self.items)]


class Clock(Protocol):
    """How to time on a device."""

    rotated_bytes: int

    def time(
        self,
        callables: Mapping[str, Call],
        *,
        rounds: int,
        seconds: float,
        copies: int,
        before: Callable[[], None] | None = None,
    ) -> dict[str, Timing]:
        """`time_interleaved` of that device; `copies`: of the rotated operands."""


class WallClock:
    """Of CPUs: `time_interleaved`."""

    rotated_bytes = ROTATED_BYTES

    def time(
        self,
        callables: Mapping[str, Call],
        *,
        rounds: int,
        seconds: float,
        copies: int = 0,
        before: Callable[[], None] | None = None,
    ) -> dict[str, Timing]:
        """See `time_interleaved`, where every call has its own number anyway."""
        return time_interleaved(callables, rounds=rounds, seconds=seconds, before=before)


class GraphClock:
    """Of GPUs: a CUDA graph of several calls, each on operands of its own, replayed between events.

    What Python and the launches cost is not in it. A callable that cannot be captured (it asks the
    device something, or allocates outside of torch) is run eagerly between the events, and its
    Timing says so.

    Args:
        l2_bytes: size of the L2 cache; operands rotate through four times as much.
        cuda: `torch.cuda`, or what stands in for it in a test.
    """

    def __init__(self, l2_bytes: int, cuda: Any = torch.cuda) -> None:
        self.rotated_bytes = 4 * l2_bytes
        self.cuda = cuda

    def time(
        self,
        callables: Mapping[str, Call],
        *,
        rounds: int,
        seconds: float,
        copies: int = 0,
        before: Callable[[], None] | None = None,
    ) -> dict[str, Timing]:
        """See `time_interleaved`; a graph holds a call on each copy, `before` precedes a replay."""
        calls = min(max(copies, LEAST_CALLS), MOST_CALLS)
        runs, how = {}, {}
        for name, call in callables.items():
            runs[name], how[name] = self._prepare(call, calls)
        times: dict[str, list[float]] = {name: [] for name in callables}
        began = time.perf_counter()
        for i in range(rounds):
            for name, run in runs.items():
                if before is not None:
                    before()
                times[name].append(self._seconds(run) / calls)
            if i >= 4 and time.perf_counter() - began > seconds:
                break
        return {name: Timing(tuple(values), how[name]) for name, values in times.items()}

    def _prepare(self, call: Call, calls: int) -> tuple[Callable[[], object], str]:
        """(function that runs so many calls, how it does)."""

        def all_calls() -> None:
            for i in range(calls):
                call(i)

        # Capturing wants a warm-up on a stream of its own: kernels compile, libraries allocate.
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            for i in range(3):
                call(i)
        self.cuda.current_stream().wait_stream(side)
        self.cuda.synchronize()
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph):
                all_calls()
        except RuntimeError as error:
            self.cuda.synchronize()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return all_calls, f"eager: {reason}"
        graph.replay()
        self.cuda.synchronize()
        return graph.replay, "graph replay"

    def _seconds(self, run: Callable[[], object]) -> float:
        start = self.cuda.Event(enable_timing=True)
        stop = self.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    if device.type != "cuda":
        return WallClock()
    l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return GraphClock(l2_bytes)
