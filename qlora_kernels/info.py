"""What this installation can do: versions, the native library, every op × backend, with reasons.

`python -m qlora_kernels info` prints it for this machine; `--markdown` prints the support matrix of
the README, which depends on the registry alone and so reads the same on every machine.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from qlora_kernels.backends import library
from qlora_kernels.backends.cpu.common import ISA_NAMES, machine_isa
from qlora_kernels.backends.registry import OPS, PRODUCTS_ONLY, KernelEntry, Problem, entries
from qlora_kernels.formats import list_formats
from qlora_kernels.formats.quantized_weight import WEIGHT_DTYPES

_DEVICES = ("cpu", "cuda")
_DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
# What the public functions let through; a backend may compute more for tests and gradchecks.
_PUBLIC_DTYPES = {
    "quantize": WEIGHT_DTYPES,
    "double_quantize": (torch.float32,),
    "dequantize": WEIGHT_DTYPES,
    "dequantize_many": WEIGHT_DTYPES,
}


def render() -> str:
    """The account for this machine, as text."""
    backends = _backend_names()
    table = [["op", *backends]]
    for op in OPS:
        by_name = {entry.backend: entry for entry in entries(op)}
        table.append([op, *(_here(by_name.get(name)) for name in backends)])
    sections = [
        _versions(),
        f"formats: {', '.join(list_formats())}",
        "\n".join(_aligned(table)),
        "\n".join(_reasons()),
    ]
    return "\n\n".join(section for section in sections if section)


def render_markdown() -> str:
    """The support matrix: which dtypes each backend family takes, per op.

    A family is the part of a backend's name before the colon; its variants are listed below the
    table. A cell names the dtypes that every variant takes on at least one device.
    """
    families: dict[str, list[str]] = {}
    for name in _backend_names():
        family, _, variant = name.partition(":")
        families.setdefault(family, []).extend([variant] if variant else [])
    lines = [
        "| op | " + " | ".join(f"`{family}`" for family in families) + " |",
        "|---" * (1 + len(families)) + "|",
    ]
    for op in OPS:
        cells = [_dtype_cell(op, family) for family in families]
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    lines.append("")
    for family, variants in families.items():
        chosen = f": {', '.join(variants)}" if variants else ""
        lines.append(f"- `{family}` runs on {_devices(family)}{chosen}")
    return "\n".join(lines)


def main(markdown: bool = False) -> None:
    """Prints `render_markdown()` or `render()`."""
    print(render_markdown() if markdown else render())


def _versions() -> str:
    try:
        own = version("qlora_kernels")
    except PackageNotFoundError:
        own = "(not installed)"
    loaded = library.load()
    if loaded.missing:
        native = f"missing: {loaded.missing}"
    else:
        built = f"{loaded.build['compiler']}, torch {loaded.build['torch']}"
        native = f"{loaded.path} (built by {built}; {_cuda_build(loaded.build)})"
    return "\n".join(
        [
            f"qlora_kernels {own}, torch {torch.__version__}, Python {platform.python_version()}",
            f"native library: {native}",
            f"CPU: {_cpu()}",
            f"GPU: {_gpus()}",
        ]
    )


def _cpu() -> str:
    level = machine_isa()
    best = "level unknown without the native library" if level < 0 else f"up to {ISA_NAMES[level]}"
    return f"{platform.machine()}, {best}, {torch.get_num_threads()} threads"


def _cuda_build(build: Mapping[str, str]) -> str:
    if "cuda_archs" not in build:
        return "no CUDA"
    runtime = int(build["cuda_runtime"])
    archs = ", ".join(f"sm_{arch}" for arch in build["cuda_archs"].split())
    return f"CUDA {runtime // 1000}.{runtime % 1000 // 10}: {archs}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    if not library.load().missing:
        arch = torch.ops.qlora_kernels_native.build_probe()
        ran = f"runs the library's sm_{arch // 10} code" if arch > 0 else f"CUDA error {-arch}"
        names.append(f"the current one: {ran}")
    return "; ".join(names)


def _backend_names() -> list[str]:
    """Every registered backend, the slowest first; after them those that only forcing takes."""
    priority: dict[str, int] = {}
    for entry in _all_entries():
        priority[entry.backend] = min(entry.priority, priority.get(entry.backend, entry.priority))
    return sorted(priority, key=lambda name: (name in PRODUCTS_ONLY, priority[name], name))


def _all_entries() -> Iterable[KernelEntry]:
    return (entry for op in OPS for entry in entries(op))


def _here(entry: KernelEntry | None) -> str:
    """One cell of the machine's table."""
    if entry is None:
        return "-"
    return "no" if entry.available() else "yes"


def _reasons() -> list[str]:
    """Why backends cannot run here, one line a backend: the reasons of its ops, once each."""
    reasons: dict[str, dict[str, None]] = {}
    for entry in _all_entries():
        reason = entry.available()
        if reason:
            reasons.setdefault(entry.backend, {})[reason] = None
    return [f"{backend}: {'; '.join(found)}" for backend, found in reasons.items()]


def _accepts(entry: KernelEntry, device: str, dtype: torch.dtype) -> bool:
    """Whether an entry takes a middling problem of that dtype: no size that is special anywhere."""
    problem = Problem(
        op=entry.op,
        device_type=device,
        dtype=dtype,
        tokens=64,
        out_features=512,
        in_features=512,
        rank=16,
    )
    return entry.rejects(problem) is None


def _family(family: str, op: str) -> list[KernelEntry]:
    return [entry for entry in entries(op) if entry.backend.split(":")[0] == family]


def _dtype_cell(op: str, family: str) -> str:
    variants = _family(family, op)
    taken = [
        name
        for dtype, name in _DTYPES.items()
        if variants
        and dtype in _PUBLIC_DTYPES.get(op, _DTYPES)
        and all(any(_accepts(entry, device, dtype) for device in _DEVICES) for entry in variants)
    ]
    return ", ".join(taken) or "-"


def _devices(family: str) -> str:
    """Devices on which every op of the family takes some dtype."""
    found = [
        device
        for device in _DEVICES
        if all(
            any(_accepts(entry, device, dtype) for dtype in _DTYPES)
            for op in OPS
            for entry in _family(family, op)
        )
    ]
    return " and ".join(found) or "no device"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
