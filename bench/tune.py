"""`bench.run --tune`: launch configurations of Triton's fused matmuls, timed on this GPU.

For every layer, number of tokens and direction it verifies and times candidates around the one
that the heuristic of `backends/launch_config.py` takes, and prints the rows of its `TUNED` that are
worth having: exact keys, on this GPU's name, and only where the winner beats the heuristic by more
than noise explains. Rows are for review: the command changes no code.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import qlora_kernels as qlk
from bench.compare import SIGMAS, Estimate
from bench.gpu.table import points_of
from bench.grid.case import Case
from bench.grid.command import SCHEMA, filters_of, limits_of
from bench.grid.peers import FAILURES, first_line
from bench.grid.points import Point
from bench.grid.sweep import CASES
from bench.machine import machine_record, machine_slug
from bench.records import statistics_ms, write_json
from qlora_kernels.backends import launch_config
from qlora_kernels.backends.device import DeviceFacts, device_facts
from qlora_kernels.backends.launch_config import MatmulConfig, MatmulSizes
from qlora_kernels.errors import BackendError
from qlora_kernels.testing.timing import Call, Timing, clock_for

# A configuration of its own must save so much at least: every row is one more thing to review.
LEAST_GAIN = 0.03
OPS = {"forward": "quantized_matmul", "backward": "quantized_matmul_backward_input"}
HEURISTIC = "heuristic"
BACKEND = "triton"


def sizes_of(point: Point) -> MatmulSizes:
    """What the table's key says of a point."""
    block_size = qlk.get_format(point.format).block_size
    return MatmulSizes(point.M, point.N, point.K, point.torch_dtype, block_size)


def heuristic(direction: str, sizes: MatmulSizes, facts: DeviceFacts) -> MatmulConfig:
    """The configuration without any row of the table."""
    bare = DeviceFacts("", facts.capability, facts.sm_count)
    chosen = {"forward": launch_config.forward_config, "backward": launch_config.backward_config}
    return chosen[direction](sizes, bare)


def candidates(base: MatmulConfig, sizes: MatmulSizes, direction: str) -> list[MatmulConfig]:
    """Configurations that differ from `base` in one or two respects and could run.

    Tiles are powers of two from 16 that tl.dot takes; a tile along K covers whole scale groups; a
    thread has between 16 and 256 accumulators, or it would idle or spill; only the forward splits.
    """
    found = [base]
    group = launch_config.scale_group(sizes.block_size)
    parts = (base.splits, 1, max(1, base.splits // 2), 2 * base.splits)
    for values in itertools.product(
        {base.tile_m, max(16, base.tile_m // 2), min(256, 2 * base.tile_m)},
        {base.tile_n, max(32, base.tile_n // 2), min(256, 2 * base.tile_n)},
        {base.tile_k, max(group, base.tile_k // 2), 2 * base.tile_k},
        set(parts) if direction == "forward" else {1},
        {base.num_warps, 4, 8},
        {base.num_stages, 2, 3, 4},
        # Every kernel can gather; where bytes may be permuted is the heuristic's to say.
        {base.decode, "gather"},
    ):
        config = MatmulConfig(*values)
        if differences(config, base) <= 2 and possible(config, sizes, direction):
            found.append(config)
    return list(dict.fromkeys(found))


def differences(one: MatmulConfig, other: MatmulConfig) -> int:
    """In how many respects two configurations differ."""
    mine, theirs = dataclasses.astuple(one), dataclasses.astuple(other)
    return sum(a != b for a, b in zip(mine, theirs, strict=True))


def possible(config: MatmulConfig, sizes: MatmulSizes, direction: str) -> bool:
    """Whether the kernel can take it at all; see `candidates`."""
    group = launch_config.scale_group(sizes.block_size)
    outputs = config.tile_m * (config.tile_n if direction == "forward" else config.tile_k)
    per_thread = outputs / (32 * config.num_warps)
    whole = config.tile_k % group == 0 and sizes.in_features % config.tile_k == 0
    enough = config.splits * config.tile_k <= sizes.in_features
    return whole and enough and 4 <= per_thread <= 256


def choose(times: Mapping[MatmulConfig, Timing], base: MatmulConfig) -> MatmulConfig | None:
    """The fastest configuration, if it beats `base` by `LEAST_GAIN` and by more than noise.

    Noise is that of `bench.compare`: three standard errors of the ratio of the two medians.
    """
    if base not in times:
        return None
    best = min(times, key=lambda config: times[config].median)
    if best == base:
        return None
    errors = [Estimate.of(statistics_ms(times[config])).error for config in (best, base)]
    noise = SIGMAS * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    gain = 1 - times[best].ratio_to(times[base])
    return best if gain > max(LEAST_GAIN, noise) else None


def entry(device: str, direction: str, sizes: MatmulSizes, config: MatmulConfig) -> str:
    """A row of `TUNED`, as it stands in the source."""
    key = ", ".join(f"{name}={value!r}" for name, value in sizes._asdict().items())
    return f"    ({device!r}, {direction!r}, MatmulSizes({key})): {config!r},"


@contextmanager
def using(
    direction: str, facts: DeviceFacts, sizes: MatmulSizes, config: MatmulConfig
) -> Iterator[None]:
    """The table with that row for the problem, whatever it says otherwise."""
    key = (facts.name, direction, sizes)
    before = dict(launch_config.TUNED)
    launch_config.TUNED[key] = config
    try:
        yield
    finally:
        launch_config.TUNED.clear()
        launch_config.TUNED.update(before)


def problems(options: argparse.Namespace, device_type: str) -> Iterator[tuple[str, Point]]:
    """(direction, point) of what the options choose and the fused kernels take."""
    filters = filters_of(options)
    for direction, op in OPS.items():
        arguments = (filters.shapes, filters.tokens, filters.formats, (0,), device_type)
        for point, reason in points_of(op, *arguments):
            fused = launch_config.choose_path(sizes_of(point)) == "fused"
            if point.backend == BACKEND and reason is None and fused:
                yield direction, point


def tune_one(
    direction: str, point: Point, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Times of a problem's candidates, those that fail left out with the reason, and the choice."""
    clock, facts, sizes = clock_for(device), device_facts(device), sizes_of(point)
    limits = limits_of(options)
    base = heuristic(direction, sizes, facts)
    with qlk.backend(BACKEND):
        case: Case = CASES[point.op](point, device, clock.rotated_bytes)
    times: dict[MatmulConfig, Timing] = {}
    failed: dict[str, str] = {}
    for config in candidates(base, sizes, direction):
        with using(direction, facts, sizes, config), qlk.backend(BACKEND), torch.no_grad():
            try:
                case.verify()
            except (AssertionError, *FAILURES) as error:
                failed[repr(config)] = first_line(error)
                continue
            calls: dict[str, Call] = {"ours": case.call}
            found = clock.time(
                calls, rounds=limits.rounds, seconds=min(limits.seconds, 0.3), copies=case.copies
            )
            times[config] = found["ours"]
    best = choose(times, base)
    return {
        "key": f"{direction}: {point.key}",
        "heuristic": repr(base),
        "chosen": repr(best) if best else None,
        "entry": entry(facts.name, direction, sizes, best) if best else None,
        "times_ms": {repr(config): statistics_ms(timing) for config, timing in times.items()},
        "failed": failed,
    }


def main(options: argparse.Namespace) -> int:
    """Tune what the options choose.

    Raises:
        BackendError: there is no GPU to tune for.
    """
    if not torch.cuda.is_available():
        raise BackendError(
            "bench: --tune times launch configurations on the GPU they are for, "
            "and torch sees no CUDA device"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    path: Path = options.out / machine_slug(device) / "tuned.json"
    rows: list[dict[str, Any]] = []
    for direction, point in problems(options, "cuda"):
        rows.append(tune_one(direction, point, device, options))
        record = {"schema": SCHEMA, "machine": machine_record(options.threads, device)}
        write_json(path, {**record, "tuned": rows})
        print(f"{rows[-1]['key']}: {rows[-1]['chosen'] or HEURISTIC}", file=sys.stderr)
    print(f"# For TUNED in qlora_kernels/backends/launch_config.py; times are in {path}.")
    print("\n".join(row["entry"] for row in rows if row["entry"]) or "# The heuristic stands.")
    return 0
