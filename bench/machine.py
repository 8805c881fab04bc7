"""What a time depends on: the machine, the software and the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from qlora_kernels.backends.cpu.common import ISA_NAMES, machine_isa

PACKAGES = ("torch", "qlora_kernels", "triton", "bitsandbytes", "peft", "transformers", "torchao")
GPU_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
HERE = Path(__file__).resolve().parent


def cpu_name() -> str:
    """The model name that the kernel reports, e.g. "Intel(R) Xeon(R) Processor"."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def machine_record(threads: int, device: torch.device | None = None) -> dict[str, object]:
    """Everything about the machine and the software that a time depends on."""
    record: dict[str, object] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": ISA_NAMES[machine_isa()] if machine_isa() >= 0 else "no native library",
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device is not None and device.type == "cuda":
        record["gpu"] = gpu_record(device)
    return record


def gpu_record(device: torch.device) -> dict[str, object]:
    """A GPU's properties, and what its driver says of clocks and power now."""
    properties = torch.cuda.get_device_properties(device)
    record: dict[str, object] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        values = done.stdout.strip().splitlines()[:1]
        record["driver"] = values[0] if values else done.stderr.strip()
    return record


def package_version(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that was measured, with "+changes" if the working tree differs from it."""
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def git(*arguments: str, where: Path = HERE) -> str:
    """What a git command prints.

    Raises:
        subprocess.CalledProcessError: git refuses; OSError: there is no git.
    """
    done = subprocess.run(
        ["git", *arguments], cwd=where, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def machine_slug(device: torch.device | None = None) -> str:
    """A folder name for the machine: the GPU, or the CPU with its cores and instruction set."""
    if device is not None and device.type == "cuda":
        words = [torch.cuda.get_device_name(device)]
    else:
        isa = ISA_NAMES[machine_isa()] if machine_isa() >= 0 else "reference"
        name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", cpu_name(), flags=re.IGNORECASE)
        words = [*name.split(), f"{os.cpu_count()}-cores", isa]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
