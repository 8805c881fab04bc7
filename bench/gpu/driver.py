"""Every op of every backend that a device has, once, on small ragged problems, checked.

`python -m bench.gpu.driver --device cuda [--backend triton] [--poison]`: what compute-sanitizer and
ncu watch. With --poison memory is full of NaN before it is written: an element that a kernel leaves
out fails the comparison.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

# cuBLAS wants it said before it starts, or refuses to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from bench.grid.peers import FAILURES, first_line
from bench.grid.points import DTYPES, GRID_OPS, Filters, Point, expand
from bench.grid.sweep import CASES
from qlora_kernels import backend

# [N, K]: tiles that fit, tiles that do not, rows that blocks straddle.
SHAPES = {"even": (256, 512), "ragged": (130, 192), "straddling": (65, 100)}
TOKENS = (1, 5, 33, 600)


def points(
    device: torch.device, backends: Sequence[str], dtypes: Sequence[str], few: bool = False
) -> Iterator[Point]:
    """What is run: every op that the backends have for the device."""
    filters = Filters(
        ops=GRID_OPS,
        backends=backends,
        formats=("nf4", "nf4+fp32"),
        dtypes=dtypes,
        shapes={"ragged": SHAPES["ragged"]} if few else SHAPES,
        tokens=TOKENS[1:2] if few else TOKENS,
        ranks=(16,),
    )
    for point, reason in expand(filters, device.type):
        if reason is None and point.backend != "reference":
            yield point


def check(point: Point, device: torch.device) -> None:
    """Raises AssertionError where the point's result is wrong."""
    with backend(point.backend):
        CASES[point.op](point, device, rotated_bytes=1).verify()


def poisoned(function: Callable[[], None]) -> None:
    """Call a function while torch fills fresh memory with NaN (integers with their largest)."""
    # Warnings only: some of what the checks themselves use has no deterministic form on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            function()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them all; 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="all", help="comma-separated")
    parser.add_argument("--dtype", default="bf16", help=f"out of {', '.join(DTYPES)}")
    parser.add_argument("--poison", action="store_true")
    parser.add_argument("--few", action="store_true", help="one shape and one number of tokens")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    backends, dtypes = options.backend.split(","), options.dtype.split(",")
    wrong = run = 0
    for point in points(device, backends, dtypes, options.few):
        run += 1
        try:
            if options.poison:
                poisoned(lambda point=point: check(point, device))  # type: ignore[misc]
            else:
                check(point, device)
        except (AssertionError, *FAILURES) as error:
            wrong += 1
            print(f"WRONG {point.key}: {first_line(error)}")
    print(f"{run} run, {wrong} wrong")
    return 1 if wrong or not run else 0


if __name__ == "__main__":
    sys.exit(main())
