"""The clocks: medians of rounds taken in turn, and graphs that replay calls on rotated operands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench.ceilings import TINY_SIZES, Ceilings, measure_ceilings
from qlora_kernels.testing.timing import (
    LEAST_CALLS,
    MOST_CALLS,
    ROTATED_BYTES,
    GraphClock,
    Rotation,
    Timing,
    WallClock,
    clock_for,
)


class FakeCuda:
    """Stands in for torch.cuda: a graph remembers the calls made during its capture, and replaying
    it takes a millisecond each."""

    def __init__(self, *, capturable: bool = True) -> None:
        self.now = 0.0
        self.capturing: list[int] | None = None
        self.capturable = capturable
        self.log: list[str] = []

    def work(self, i: int) -> None:
        if self.capturing is not None:
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            self.capturing.append(i)
        else:
            self.log.append("eager")
            self.now += 2e-3

    class Graph:
        def __init__(self, cuda: FakeCuda) -> None:
            self.cuda, self.calls = cuda, []

        def replay(self) -> None:
            self.cuda.log.append("replay")
            self.cuda.now += 1e-3 * len(self.calls)

    def CUDAGraph(self) -> Graph:
        return FakeCuda.Graph(self)

    @contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self.capturing = graph.calls
        try:
            yield
        finally:
            self.capturing = None

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append("side stream")
        yield

    class Marker:
        def __init__(self, cuda: FakeCuda) -> None:
            self.cuda = cuda

        def record(self) -> None:
            self.at = self.cuda.now

        def synchronize(self) -> None:
            self.cuda.log.append("waited")

        def elapsed_time(self, other: FakeCuda.Marker) -> float:
            return (other.at - self.at) * 1e3

        def wait_stream(self, other: object) -> None:
            self.cuda.log.append("ordered")

    def Event(self, enable_timing: bool) -> Marker:
        assert enable_timing
        return FakeCuda.Marker(self)

    def Stream(self) -> Marker:
        return FakeCuda.Marker(self)

    current_stream = Stream

    def synchronize(self) -> None:
        self.log.append("synchronized")


@pytest.mark.parametrize(("copies", "calls"), [(1, LEAST_CALLS), (20, 20), (9999, MOST_CALLS)])
def test_graph_holds_a_call_per_copy_and_is_replayed(copies: int, calls: int) -> None:
    cuda = FakeCuda()
    clock = GraphClock(60 << 20, cuda)
    times = clock.time({"a": cuda.work, "b": cuda.work}, rounds=7, seconds=9.0, copies=copies)
    assert clock.rotated_bytes == 240 << 20
    assert set(times) == {"a", "b"}
    for timing in times.values():
        assert timing.how == "graph replay" and len(timing.seconds) == 7
        assert timing.median == pytest.approx(1e-3)
    # Warm-ups on a side stream, and one replay of each graph that is not counted.
    assert cuda.log.count("eager") == 6 and cuda.log.count("side stream") == 2
    assert cuda.log.count("replay") == 2 + 2 * 7
    recorded: list[int] = []
    clock._prepare(lambda i: recorded.append(i), calls)
    assert recorded == [0, 1, 2, *range(calls)]


def test_what_cannot_be_captured_is_timed_eagerly_and_says_so() -> None:
    cuda = FakeCuda(capturable=False)
    timing = GraphClock(1, cuda).time({"a": cuda.work}, rounds=5, seconds=9.0, copies=4)["a"]
    assert timing.how == "eager: operation not permitted when stream is capturing"
    assert timing.median == pytest.approx(2e-3)
    assert "replay" not in cuda.log


def test_graph_rounds_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr("time.perf_counter", lambda: cuda.now)
    timing = GraphClock(1, cuda).time({"a": cuda.work}, rounds=99, seconds=0.05, copies=10)["a"]
    assert len(timing.seconds) == 6  # ten calls of a millisecond each; the sixth goes past 50 ms


def test_rotation_goes_past_the_caches_within_reason() -> None:
    made: list[int] = []
    rotation = Rotation(lambda i: made.append(i) or i, 60 << 20)
    assert len(rotation.items) == 3 and rotation[4] == 1
    assert len(rotation.items) * (60 << 20) > ROTATED_BYTES
    assert len(Rotation(lambda i: i, 10).items) == MOST_CALLS
    assert len(Rotation(lambda i: i, 1 << 40).items) == 2


def test_statistics() -> None:
    timing, other = Timing((1.0, 2.0, 3.0, 10.0)), Timing((1.0, 1.0, 1.0, 10.0))
    assert timing.median == 2.5 and timing.minimum == 1.0
    assert timing.ratio_to(other) == 1.5  # the median of 1, 2, 3, 1
    assert math.isnan(Timing((1.0,)).spread)


def test_a_cpu_has_wall_time() -> None:
    clock = clock_for(torch.device("cpu"))
    assert isinstance(clock, WallClock)
    order: list[str] = []
    calls = {"a": lambda _: order.append("a"), "b": lambda _: order.append("b")}
    times = clock.time(calls, rounds=5, seconds=0.0, copies=3)
    assert order == ["a", "b"] * 7  # two warm-ups and, however late it is, five rounds
    assert len(times["a"].seconds) == 5


def test_ceilings_and_floors() -> None:
    clock = WallClock()
    clock.rotated_bytes = 1 << 22
    found = measure_ceilings(
        clock, torch.device("cpu"), {"fp32": torch.float32}, TINY_SIZES, rounds=5, seconds=0.1
    )
    # Any machine moves 100 MB and multiplies 10 million numbers a second.
    assert found.copy > 1e8 and found.read > 1e8 and found.gemm["fp32"] > 1e7
    known = Ceilings(copy=100.0, read=200.0, gemm={"bf16": 1000.0})
    assert known.floor_seconds(50, 0, "bf16") == 0.5
    assert known.floor_seconds(50, 2000, "bf16") == 2.0
    assert known.floor_seconds(500, 2000, "bf16") == 5.0
