"""What the machine can do at best, measured in the run that is compared with it: bytes a second of
copying and of reading, FLOPs a second of torch's GEMM in each dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qlora_kernels.backends.cpu.common import machine_isa
from qlora_kernels.testing.timing import Call, Clock, Rotation

LINE = 64


@dataclass(frozen=True)
class Sizes:
    """Of the operands: bytes of a copy; M = N = K of the GEMM."""

    nbytes: int
    gemm: int


CPU_SIZES = Sizes(64 << 20, 1024)
GPU_SIZES = Sizes(1 << 30, 8192)
TINY_SIZES = Sizes(1 << 20, 128)


@dataclass
class Ceilings:
    """Attributes:
    copy, read: bytes a second; a copy's bytes are those read and those written.
    gemm: FLOPs a second by dtype name.
    """

    copy: float
    read: float
    gemm: dict[str, float] = field(default_factory=dict)

    def floor_seconds(self, nbytes: int, flops: int, dtype: str) -> float:
        """The least time of so many bytes and FLOPs: the longer of the two."""
        compute = flops / self.gemm[dtype] if flops else 0.0
        return max(nbytes / self.copy, compute)

    def record(self) -> dict[str, object]:
        """For the JSON record."""
        return {
            "copy_bytes_per_second": self.copy,
            "read_bytes_per_second": self.read,
            "gemm_flops_per_second": self.gemm,
        }


def measure_ceilings(
    clock: Clock,
    device: torch.device,
    dtypes: dict[str, torch.dtype],
    sizes: Sizes | None = None,
    rounds: int = 15,
    seconds: float = 3.0,
) -> Ceilings:
    """Measure them; `rounds` and `seconds` are each measurement's."""
    sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)
    limits = {"rounds": rounds, "seconds": seconds}

    def fresh(i: int) -> torch.Tensor:
        # Values differ: a GPU multiplies and moves zeros at higher clocks.
        return torch.randint(256, (sizes.nbytes,), dtype=torch.uint8, device=device)

    sources = Rotation(fresh, sizes.nbytes, clock.rotated_bytes)
    targets = [torch.zeros(sizes.nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    copies = len(sources.items)
    times = clock.time(
        {
            "copy": lambda i: targets[i % 2].copy_(sources[i]),
            "read": lambda i: _read(sources[i]),
        },
        copies=copies,
        **limits,  # type: ignore[arg-type]
    )
    found = Ceilings(2 * sizes.nbytes / times["copy"].median, sizes.nbytes / times["read"].median)
    for name, dtype in dtypes.items():
        left = torch.randn(sizes.gemm, sizes.gemm, device=device).to(dtype)
        right = torch.randn(sizes.gemm, sizes.gemm, device=device).to(dtype)
        calls = {"gemm": _gemm(left, right)}
        took = clock.time(calls, copies=2, **limits)["gemm"]  # type: ignore[arg-type]
        found.gemm[name] = 2 * sizes.gemm**3 / took.median
    return found


def _gemm(left: torch.Tensor, right: torch.Tensor) -> Call:
    return lambda _: left @ right


def _read(source: torch.Tensor) -> object:
    """Read every byte: the library's own loop on a CPU that has it, a sum elsewhere."""
    if source.device.type == "cpu" and machine_isa() >= 0:
        target = torch.zeros(256 * LINE + LINE, dtype=torch.uint8)
        target = target[-target.data_ptr() % LINE :][: 256 * LINE]
        return torch.ops.qlora_kernels_cpu.stream_bytes.default(source, target, machine_isa())
    return source.view(torch.int32).max()
