"""One kernel launch as data: what runs on a GPU is what the compile tests build without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

_KERNELS = "qlora_kernels.backends.triton.kernels"


@lru_cache(maxsize=256)
def kernel_named(name: str) -> Any:
    """The jit function of "file.function" in `kernels/`; imports triton."""
    module, _, function = name.partition(".")
    return getattr(import_module(f"{_KERNELS}.{module}"), function)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments by name (constexprs included) and its schedule."""

    kernel: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def device(self) -> torch.device:
        """Of the first tensor argument, which may be in a tuple."""
        firsts = (a[0] if isinstance(a, tuple) else a for a in self.arguments.values())
        return next(first.device for first in firsts if isinstance(first, torch.Tensor))

    def run(self) -> None:
        """Launch on the current stream of the arguments' device.

        FP fusion is off by name: rounding is part of the specification, and Triton's default for it
        changes between releases. Kernels that want a fused multiply-add say so.
        """
        device = self.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        kernel_named(self.kernel)[self.grid](
            **self.arguments,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            enable_fp_fusion=False,
        )
