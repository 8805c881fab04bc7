"""Peak memory of a run, and the bytes its base weights take.

Peak memory is what the method's own process held at most, above what it held before the model was
loaded (interpreter, torch, text). On CUDA it is the allocator's peak instead.
"""

from __future__ import annotations

import gc
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kernels.nn import QuantizedExperts, StoredWeight


class PeakMemory:
    """Starts at construction: `read` is the highest memory since, in bytes above the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        else:
            reset_resident_peak()
            self.start = resident_peak()

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return resident_peak() - self.start


def reset_resident_peak() -> None:
    """Make the resident peak equal the current resident size, where Linux lets a process do so;
    elsewhere the peak so far is the start, and what is under it cannot be seen."""
    control = Path("/proc/self/clear_refs")
    try:
        control.write_text("5", encoding="ascii")
    except OSError:
        return


def resident_peak() -> int:
    """Highest resident size of this process in bytes, since `reset_resident_peak` if it can."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    if found is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(found[1]) * 1024


def base_weight_bytes(model: nn.Module, adapters: Iterable[Tensor]) -> int:
    """Bytes of every parameter that is not an adapter's: codes, scales, and what stayed dense."""
    excluded = {id(tensor) for tensor in adapters}
    return sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if id(parameter) not in excluded
    )


def stored_weights(model: nn.Module) -> tuple[int, int]:
    """How many weights a model has quantized, and the bytes that store them."""
    weights = size = 0
    for module in model.modules():
        if isinstance(module, StoredWeight):
            weights += module.quantized_weight.numel
            size += module.quantized_weight.nbytes
        elif isinstance(module, QuantizedExperts):
            likes = module.projections.values()
            weights += module.num_experts * sum(like.numel for like in likes)
            size += sum(p.nbytes for n, p in _storing(module) if not n.endswith("_codebook"))
    return weights, size


def parameter_count(model: nn.Module) -> int:
    """Weights of a model, a quantized one's counted as the dense ones that they stand for."""
    stored = {id(p) for module in model.modules() for _, p in _storing(module)}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in stored)
    return dense + stored_weights(model)[0]


def _storing(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module that store quantized weights, with their names."""
    names: tuple[str, ...] = ("weight",) if isinstance(module, StoredWeight) else ()
    if isinstance(module, QuantizedExperts):
        names = tuple(module.projections)
    own = module.named_parameters(recurse=False)
    return [(name, parameter) for name, parameter in own if name.startswith(names)]
