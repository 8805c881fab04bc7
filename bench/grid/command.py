"""The grid as `bench.run` runs it: options to filters, a table, one record on disk."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import TINY_SIZES, Ceilings, measure_ceilings
from bench.grid.points import DTYPES, GRID_OPS, Filters, expand
from bench.grid.sweep import Limits, Sweep, run_sweep
from bench.machine import machine_record, machine_slug
from bench.records import Settings, markdown, write_json
from bench.run import GRID_DEFAULTS
from bench.shapes import parse_shapes
from qlora_kernels.errors import argument_error
from qlora_kernels.formats import list_formats
from qlora_kernels.testing.timing import Clock, clock_for

SCHEMA = 1


def numbers(name: str, text: str) -> list[int]:
    """Positive integers of a comma-separated list."""
    try:
        found = [int(item) for item in text.split(",")]
    except ValueError as error:
        raise argument_error("bench", name, "comma-separated integers", repr(text)) from error
    if min(found) < 1:
        raise argument_error("bench", name, "1 or more", repr(text))
    return found


def filters_of(options: argparse.Namespace) -> Filters:
    """The filters of a command line."""
    chosen = {name: getattr(options, name) or GRID_DEFAULTS[name] for name in GRID_DEFAULTS}
    formats = list_formats() if chosen["format"] == "all" else chosen["format"].split(",")
    return Filters(
        ops=options.only.split(",") if options.only else GRID_OPS,
        backends=chosen["backend"].split(","),
        formats=formats,
        dtypes=chosen["dtype"].split(","),
        shapes=parse_shapes(chosen["shape"]),
        tokens=numbers("tokens", chosen["tokens"]),
        ranks=numbers("rank", chosen["rank"]),
    )


def device_of(name: str | None) -> torch.device:
    """The device, or ArgumentError where torch cannot use it."""
    device = torch.device(name or GRID_DEFAULTS["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argument_error("bench", "device", "one that torch can use", name)
    return device


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits of a command line."""
    peers: tuple[str, ...] | None = None
    if options.peers == "none":
        peers = ()
    elif options.peers not in (None, "all"):
        peers = tuple(options.peers.split(","))
    return Limits(options.rounds, options.seconds, peers)


def ceilings_for(
    filters: Filters, device: torch.device, clock: Clock, settings: Settings
) -> Ceilings:
    """Measured ceilings; tiny ones where only tiny layers are measured."""
    dtypes = {name: DTYPES[name] for name in dict.fromkeys([*filters.dtypes, "fp32"])}
    largest = max(rows * cols for rows, cols in filters.shapes.values())
    sizes = TINY_SIZES if largest <= 128 * 128 else None
    rounds = min(settings.rounds, 15)
    return measure_ceilings(clock, device, dtypes, sizes, rounds, min(settings.seconds, 3.0))


def record_of(
    filters: Filters, device: torch.device, settings: Settings, ceilings: Ceilings, sweep: Sweep
) -> dict[str, Any]:
    """Everything that a sweep leaves behind."""
    return {
        "schema": SCHEMA,
        "kind": "grid",
        "machine": machine_record(settings.threads, device),
        "device": str(device),
        "filters": vars(filters),
        "ceilings": ceilings.record(),
        **sweep.content(),
    }


def main(options: argparse.Namespace, settings: Settings) -> int:
    """Measure, print, write; 1 if a result was wrong."""
    filters, device = filters_of(options), device_of(options.device)
    clock = clock_for(device)
    ceilings = ceilings_for(filters, device, clock, settings)
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path: Path = options.out / machine_slug(device) / f"grid-{now}.json"

    def keep(sweep: Sweep) -> None:
        write_json(path, record_of(filters, device, settings, ceilings, sweep))
        count = len(sweep.points) + len(sweep.refused)
        print(f"\r{count} points measured", end="", file=sys.stderr)

    sweep = run_sweep(
        expand(filters, device.type), device, clock, ceilings, limits_of(options), keep
    )
    keep(sweep)
    print(f", {path}", file=sys.stderr)
    print(text_of(sweep, ceilings))
    return 1 if sweep.refused else 0


def text_of(sweep: Sweep, ceilings: Ceilings) -> str:
    """A sweep for people."""
    rates = ", ".join(f"{name} GEMM {rate / 1e9:,.1f}" for name, rate in ceilings.gemm.items())
    lines = [
        f"ceilings: copy {ceilings.copy / 1e9:.1f} GB/s, read {ceilings.read / 1e9:.1f} GB/s; "
        f"GFLOP/s: {rates}",
        "",
        "`floor` is what bytes at the copy's rate or FLOPs at the GEMM's take at least; "
        "`x` is how many times as fast ours is.",
        "",
    ]
    head = ["point", "ms", "± %", "floor ms", "share", "peers: ms (x)"]
    rows = []
    for point in sweep.points:
        ours = point["ours_ms"]
        timed = {n: p for n, p in point["peers_ms"].items() if "missing" not in p}
        beside = "; ".join(f"{n} {p['median']:.4g} ({p['speedup']:.2f})" for n, p in timed.items())
        rows.append(
            [
                point["key"],
                f"{ours['median']:.4g}",
                f"{ours['spread'] * 50:.0f}",
                f"{point['floor_ms']:.4g}",
                f"{point['share']:.0%}",
                beside or "-",
            ]
        )
    lines.append(markdown([head, *rows]))
    missing: dict[str, str] = {}
    for point in sweep.points:
        for name, peer in point["peers_ms"].items():
            if "missing" in peer:
                missing.setdefault(f"{name}: {peer['missing']}", point["key"])
    lines += ["", *(f"missing peer, {reason} (first at {key})" for reason, key in missing.items())]
    skipped: dict[str, int] = {}
    for point in sweep.skipped:
        text = f"{point['backend']}: {point['reason']}"
        skipped[text] = skipped.get(text, 0) + 1
    lines += [f"skipped {count} points, {reason}" for reason, count in skipped.items()]
    lines += [f"WRONG, not timed: {p['key']}: {p['reason']}" for p in sweep.refused]
    return "\n".join(lines).rstrip()
