"""Measure points: verify, time ours and its peers in turn, say what was refused or is missing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import qlora_kernels as qlk
from bench.ceilings import Ceilings
from bench.grid import codecs, group, matmuls
from bench.grid.case import Case
from bench.grid.peers import FAILURES, PeerMissing, first_line
from bench.grid.points import GROUP, LAYER, Point
from bench.records import statistics_ms
from qlora_kernels.testing.timing import Call, Clock, Timing

CASES: dict[str, type[Case]] = {
    "quantize": codecs.Quantize,
    "double_quantize": codecs.DoubleQuantize,
    "dequantize": codecs.Dequantize,
    "dequantize_many": codecs.DequantizeMany,
    "dropout": codecs.Dropout,
    "quantized_matmul": matmuls.Matmul,
    "quantized_matmul_backward_input": matmuls.MatmulBackwardInput,
    "qlora_linear": matmuls.QLoRA,
    "qlora_linear_backward": matmuls.QLoRABackward,
    LAYER: matmuls.LoRALayer,
    GROUP: group.LoRAGroup,
}


@dataclass(frozen=True)
class Limits:
    """Of one measurement: most rounds, and seconds after which no further one starts.

    peers: names of peers to measure, by any part of the name; None: all.
    """

    rounds: int = 30
    seconds: float = 3.0
    peers: Sequence[str] | None = None


@dataclass
class Sweep:
    """What a sweep found; `content` is its part of a record.

    Attributes:
        points: figures of what was measured.
        skipped: points that no backend, or not the wanted one, can run here, with the reason.
        refused: points whose result was wrong, or that failed, with what was wrong; not timed.
    """

    points: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """For the JSON record."""
        return {"points": self.points, "skipped": self.skipped, "refused": self.refused}


def run_sweep(
    points: Iterable[tuple[Point, str | None]],
    device: torch.device,
    clock: Clock,
    ceilings: Ceilings,
    limits: Limits,
    done: Callable[[Sweep], None] | None = None,
) -> Sweep:
    """Measure every point; `done` is called after each, with everything so far."""
    sweep = Sweep()
    for point, reason in points:
        if reason is not None:
            sweep.skipped.append({**point.record(), "reason": reason})
            continue
        try:
            sweep.points.append(measure(point, device, clock, ceilings, limits))
        except AssertionError as error:
            sweep.refused.append({**point.record(), "reason": str(error)})
        except torch.OutOfMemoryError as error:
            reason = f"out of memory: {first_line(error)}"
            sweep.skipped.append({**point.record(), "reason": reason})
        except FAILURES as error:
            sweep.refused.append({**point.record(), "reason": f"fails: {first_line(error)}"})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if done is not None:
            done(sweep)
    return sweep


def measure(
    point: Point, device: torch.device, clock: Clock, ceilings: Ceilings, limits: Limits
) -> dict[str, Any]:
    """One point's figures; times in milliseconds, `share` is the floor's share of the time.

    Raises:
        AssertionError: the result is wrong; nothing is timed then.
    """
    with qlk.backend(point.backend):
        case = CASES[point.op](point, device, clock.rotated_bytes)
        case.verify()

    def ours(i: int) -> object:
        with qlk.backend(point.backend):
            return case.call(i)

    calls: dict[str, Call] = {"ours": ours}
    missing = {}
    for name, make in case.peers().items():
        if limits.peers is not None and not any(part in name for part in limits.peers):
            continue
        try:
            calls[name] = make()
            with torch.set_grad_enabled(case.with_grad):
                calls[name](0)
        except PeerMissing as error:
            missing[name] = str(error)
        except (AssertionError, *FAILURES) as error:
            missing[name] = f"fails here: {first_line(error)}"
        if name in missing:
            calls.pop(name, None)
    with torch.set_grad_enabled(case.with_grad):
        times = clock.time(calls, rounds=limits.rounds, seconds=limits.seconds, copies=case.copies)
    return figures(point, case, times, missing, ceilings)


def figures(
    point: Point,
    case: Case,
    times: dict[str, Timing],
    missing: dict[str, str],
    ceilings: Ceilings,
) -> dict[str, Any]:
    """A point's part of the record."""
    ours = times["ours"]
    floor = ceilings.floor_seconds(case.nbytes, case.flops, point.dtype)
    peers: dict[str, Any] = {
        name: {
            **statistics_ms(timing),
            "how": timing.how,
            # How many times as fast ours is, the median over the rounds.
            "speedup": round(timing.ratio_to(ours), 4),
        }
        for name, timing in times.items()
        if name != "ours"
    }
    peers |= {name: {"missing": reason} for name, reason in missing.items()}
    return {
        **point.record(),
        "ours_ms": {**statistics_ms(ours), "how": ours.how},
        "peers_ms": peers,
        "nbytes": case.nbytes,
        "flops": case.flops,
        "floor_ms": round(floor * 1e3, 6),
        "share": round(floor / ours.median, 4),
        "gigabytes_per_second": round(case.nbytes / ours.median / 1e9, 3),
        "teraflops": round(case.flops / ours.median / 1e12, 4),
    }
