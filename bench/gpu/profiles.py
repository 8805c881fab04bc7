"""Stage "profile": where the time of the main kernels goes, by torch's profiler and by ncu."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.context import Context
from bench.gpu.table import LARGE, SMALL
from bench.grid.points import LAYER, Filters, Point, expand
from bench.grid.sweep import CASES
from qlora_kernels import backend

ROOT = Path(__file__).resolve().parents[2]
PROFILED = (("dequantize", 0), ("quantized_matmul", 1), ("quantized_matmul", 64), (LAYER, 4096))
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
SHOWN = 15


def wanted(context: Context) -> list[Point]:
    """What is profiled, on every backend of a GPU."""
    found = []
    backends = ("all",) if context.device.type == "cuda" else ("auto",)
    for op, tokens in PROFILED:
        shape = {"tiny": (128, 128)} if context.smoke else {"real": SMALL if op == LAYER else LARGE}
        count = min(tokens, 8) if context.smoke else tokens
        filters = Filters((op,), backends, ("nf4",), ("bf16",), shape, (count,), (16,))
        for point, reason in expand(filters, context.device.type):
            if reason is None and point.backend != "reference":
                found.append(point)
    return found


def profiles(context: Context) -> None:
    """torch's profiler over a few calls of each, then ncu over the driver where there is one."""
    rows: dict[str, Any] = dict(context.content.get("torch", {}))
    for point in wanted(context):
        if point.key not in rows and context.left > 0:
            rows[point.key] = kernels_of(point, context.device)
            context.save(torch=rows)
    ncu = shutil.which("ncu")
    if ncu is None or context.device.type != "cuda":
        context.save(ncu={"missing": "ncu is not on PATH" if ncu is None else "no CUDA device"})
        return
    log = context.out / "ncu.csv"
    command = [ncu, "--csv", "--log-file", str(log), "--target-processes", "all"]
    command += [f"--section={name}" for name in SECTIONS]
    command += [sys.executable, "-m", "bench.gpu.driver", "--few"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(10.0, context.left)
        )
        end = (done.stdout + done.stderr)[-500:]
        context.save(ncu={"file": log.name, "exit_status": done.returncode, "end": end})
    except subprocess.TimeoutExpired:
        context.save(ncu={"file": log.name, "exit_status": None, "end": "out of time"})


def kernels_of(point: Point, device: torch.device, calls: int = 5) -> list[dict[str, Any]]:
    """Time on the device by kernel (on a CPU by operator) of a few calls, the longest first."""
    case = CASES[point.op](point, device, rotated_bytes=1)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with backend(point.backend), torch.set_grad_enabled(case.with_grad):
        case.call(0)
        with profile(activities=activities) as profiler:
            for i in range(calls):
                case.call(i)
            if device.type == "cuda":
                torch.cuda.synchronize()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    return [
        {
            "name": event.key,
            "us_per_call": round(getattr(event, key) / calls, 3),
            "count": event.count,
        }
        for event in events[:SHOWN]
    ]
