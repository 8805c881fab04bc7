"""What the Triton launchers share: registration, weight arguments, sizes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import torch

from qlora_kernels import env
from qlora_kernels.backends.registry import PathOf, Problem, Rejects, register_kernel
from qlora_kernels.formats.quantized_weight import WeightOperands

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Above the reference and the CPU levels; hand-written CUDA goes above it.
PRIORITY = 20


@functools.cache
def why_unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not env.triton_interpret() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def triton_rejects(dtypes: Collection[torch.dtype] = FLOAT_DTYPES) -> Rejects:
    """A `rejects` for kernels on CUDA tensors of `dtypes` (CPU tensors in the interpreter)."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def rejects(problem: Problem) -> str | None:
        device_type = "cpu" if env.triton_interpret() else "cuda"
        if problem.device_type != device_type:
            return f"device must be {device_type}, got {problem.device_type}"
        if problem.dtype not in dtypes:
            return f"dtype must be one of {names}, got {str(problem.dtype).removeprefix('torch.')}"
        return None

    return rejects


def register_triton_kernel(
    op: str, rejects: Rejects | None = None, path: PathOf | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a launcher as "triton" of `op`; by default for fp32, fp16 and bf16. The
    path is that of `KernelEntry`."""
    return register_kernel(
        op,
        "triton",
        priority=PRIORITY,
        rejects=rejects or triton_rejects(),
        available=why_unavailable,
        path=path,
    )


def weight_arguments(operands: WeightOperands) -> dict[str, Any]:
    """A weight's tensors and constants by the names that every kernel uses."""
    double_quant = operands.absmax is None
    return {
        "codes_ptr": contiguous(operands.codes),
        "absmax_ptr": contiguous(operands.absmax),
        "scale_codes_ptr": contiguous(operands.scale_codes),
        "scale_absmax_ptr": contiguous(operands.scale_absmax),
        "scale_offset_ptr": operands.scale_offset,
        "codebook_ptr": contiguous(operands.codebook),
        "scale_codebook_ptr": contiguous(operands.scale_codebook) if double_quant else None,
        "BLOCK_SIZE": operands.block_size,
        "SCALE_BLOCK_SIZE": operands.scale_block_size,
        "DOUBLE_QUANT": double_quant,
    }


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """`tensor` itself if it is contiguous, or None."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def at_word(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous byte tensor that begins at a 4-byte boundary, which is a copy only for odd
    views."""
    return tensor if tensor.data_ptr() % 4 == 0 else tensor.clone()


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Smallest power of two >= n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()
