"""The grid under pytest-benchmark: `pytest bench/test_ops.py`, one benchmark an op and backend.

For those who want its statistics, histograms and saved runs; `bench.run` has peers and rotation
past any cache. Layers are small; `bench.run --shape` measures those of real models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qlora_kernels as qlk
from bench.grid.points import GRID_OPS, Filters, Point, expand
from bench.grid.sweep import CASES
from bench.shapes import parse_shapes

pytest.importorskip("pytest_benchmark", reason="in the bench extra")

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ROTATED_BYTES = 32 << 20


def points() -> list[Any]:
    """Every op on every backend that can run here."""
    filters = Filters(
        ops=GRID_OPS,
        backends=("all",),
        formats=("nf4",),
        dtypes=("bf16",),
        shapes=parse_shapes("small"),
        tokens=(1, 16, 256),
        ranks=(16,),
    )
    return [
        pytest.param(point, device, id=f"{device}-{point.key}")
        for device in DEVICES
        for point, reason in expand(filters, device)
        if reason is None
    ]


@pytest.mark.parametrize(("point", "device"), points())
def test_op(point: Point, device: str, benchmark: Any) -> None:
    with qlk.backend(point.backend):
        case = CASES[point.op](point, torch.device(device), ROTATED_BYTES)
        case.verify()
        calls = iter(range(1 << 62))

        def call() -> None:
            case.call(next(calls))
            if device == "cuda":
                torch.cuda.synchronize()

        with torch.set_grad_enabled(case.with_grad):
            benchmark(call)
    benchmark.extra_info.update(nbytes=case.nbytes, flops=case.flops)
