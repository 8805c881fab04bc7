"""What the C++ entries share: the instruction-set levels, and one registry entry per level.

The levels and their order are `Isa` in csrc/include/qlk/types.h. An op without code of its own for
a level runs that of the next lower one, so every level is registered for every op and
`QLK_BACKEND=cpu:avx2` means the same everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch

from qlora_kernels.backends import library
from qlora_kernels.backends.registry import Problem, Rejects, register_kernel
from qlora_kernels.formats.quantized_weight import WeightOperands

ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LEAST_BLOCK_SIZE = 32  # what a vector loop decodes with one scale

# Above the reference's 0, below the accelerators, which reject CPU tensors anyway.
_BASE_PRIORITY = 10


@functools.cache
def machine_isa() -> int:
    """The machine's best level, an index into `ISA_NAMES`; -1 without the native library."""
    if library.load().missing:
        return -1
    return int(torch.ops.qlora_kernels_cpu.cpu_isa())


@functools.cache
def bf16_gemm_pays() -> bool:
    """Whether torch's bf16 GEMM beats its fp32 one here: it uses all that the machine has."""
    best = machine_isa()
    return best >= 0 and bool(torch.ops.qlora_kernels_cpu.bf16_products_pay(best))


def why_unavailable(isa: int) -> str | None:
    """Why no kernel of level `isa` can run on this machine, or None."""
    missing = library.load().missing
    if missing:
        return f"the native library is missing: {missing}"
    if isa > machine_isa():
        return (
            f"this machine has no {ISA_NAMES[isa]} (its best level is {ISA_NAMES[machine_isa()]})"
        )
    return None


def cpu_rejects(dtypes: Collection[torch.dtype] = FLOAT_DTYPES) -> Rejects:
    """A `rejects` for kernels on CPU tensors of `dtypes`."""

    def rejects(problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"device must be cpu, got {problem.device_type}"
        if problem.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"dtype must be one of {names}, got {str(problem.dtype).removeprefix('torch.')}"
        if problem.block_size < LEAST_BLOCK_SIZE and problem.batch_invariant:
            least = f"at least {LEAST_BLOCK_SIZE} with batch_invariant"
            return f"block_size must be {least}, got {problem.block_size}"
        return None

    return rejects


def register_cpu_kernel(
    op: str,
    rejects: Rejects | None = None,
    path: Callable[[int, Problem], str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register `fn(isa, *op_arguments)` as `cpu:<level>` of `op` for every level.

    Args:
        op: one of `registry.OPS`.
        rejects: problem -> reason or None; the default takes fp32, fp16 and bf16 on the CPU.
        path: level, problem -> the way the kernel takes, in words; see `KernelEntry`.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        for isa, name in enumerate(ISA_NAMES):
            register_kernel(
                op,
                f"cpu:{name}",
                priority=_BASE_PRIORITY + isa,
                rejects=rejects or cpu_rejects(),
                available=functools.partial(why_unavailable, isa),
                path=None if path is None else functools.partial(path, isa),
            )(functools.partial(fn, isa))
        return fn

    return decorate


def weight_arguments(operands: WeightOperands) -> tuple[Any, ...]:
    """A 2-D weight in the order of QLK_WEIGHT_SCHEMA (csrc/bindings/tensor_utils.h)."""
    rows, cols = operands.shape
    return (
        contiguous(operands.codes),
        *scale_arguments(operands),
        rows,
        cols,
        operands.block_size,
        operands.scale_block_size,
    )


def scale_arguments(operands: WeightOperands) -> tuple[torch.Tensor | None, ...]:
    """absmax, the scale_* three, codebook, scale_codebook: contiguous, absent ones None."""
    optional = (
        operands.absmax,
        operands.scale_codes,
        operands.scale_absmax,
        operands.scale_offset,
        operands.codebook,
        operands.scale_codebook,
    )
    return tuple(None if tensor is None else contiguous(tensor) for tensor in optional)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself if it is contiguous: asking is cheaper than calling `Tensor.contiguous`."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


__all__ = [
    "FLOAT_DTYPES",
    "ISA_NAMES",
    "bf16_gemm_pays",
    "contiguous",
    "cpu_rejects",
    "machine_isa",
    "register_cpu_kernel",
    "scale_arguments",
    "weight_arguments",
    "why_unavailable",
]
