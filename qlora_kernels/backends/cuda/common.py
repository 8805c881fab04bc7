"""What the CUDA entries share: registration, availability, the stream, a weight's arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch

from qlora_kernels.backends import library
from qlora_kernels.backends.registry import PathOf, Problem, Rejects, register_kernel
from qlora_kernels.formats.quantized_weight import WeightOperands

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Above Triton's 20.
PRIORITY = 30
LEAST_CAPABILITY = (8, 0)
# A lane takes eight elements of one block.
LEAST_BLOCK_SIZE = 16


@functools.cache
def why_unavailable() -> str | None:
    """Why no CUDA kernel of the native library can run in this process, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    native = library.load()
    if native.missing:
        return f"the native library is missing: {native.missing}"
    if "cuda_archs" not in native.build:
        return "the native library was built without CUDA kernels (QLK_BUILD_CUDA=0, or no nvcc)"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"the GPU must be sm_80 or newer, got sm_{capability[0]}{capability[1]}"
    ran = torch.ops.qlora_kernels_native.build_probe()
    if ran <= 0:
        built = native.build["cuda_archs"]
        return f"the GPU does not run the library's kernels (built for {built}): CUDA error {-ran}"
    return None


def cuda_rejects(dtypes: Collection[torch.dtype] = FLOAT_DTYPES) -> Rejects:
    """A `rejects` for kernels on CUDA tensors of `dtypes`."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def rejects(problem: Problem) -> str | None:
        if problem.device_type != "cuda":
            return f"device must be cuda, got {problem.device_type}"
        if problem.dtype not in dtypes:
            return f"dtype must be one of {names}, got {str(problem.dtype).removeprefix('torch.')}"
        if problem.block_size < LEAST_BLOCK_SIZE:
            return f"block_size must be at least {LEAST_BLOCK_SIZE}, got {problem.block_size}"
        return None

    return rejects


def register_cuda_kernel(
    op: str,
    rejects: Rejects | None = None,
    variant: str = "sm80",
    priority: int = PRIORITY,
    path: PathOf | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as `cuda:<variant>` of `op`.

    Args:
        op: one of `registry.OPS`.
        rejects: problem -> reason or None; the default takes fp32, fp16 and bf16 on CUDA.
        variant: the oldest architecture that runs it.
        priority: against the other entries of the op.
        path: of `KernelEntry`.
    """
    return register_kernel(
        op,
        f"cuda:{variant}",
        priority=priority,
        rejects=rejects or cuda_rejects(),
        available=why_unavailable,
        path=path,
    )


def current_stream(tensor: torch.Tensor) -> int:
    """The handle of torch's current stream on the tensor's device, as the bindings take it."""
    # What torch.cuda.current_stream() asks, without making a Stream object on every call.
    return int(torch._C._cuda_getCurrentRawStream(tensor.device.index))


def weight_arguments(operands: WeightOperands, rows: int, cols: int) -> tuple[Any, ...]:
    """A weight as [rows, cols], in the order of QLK_WEIGHT_SCHEMA (csrc/bindings)."""
    tensors = (
        operands.codes,
        operands.absmax,
        operands.scale_codes,
        operands.scale_absmax,
        operands.scale_offset,
        operands.codebook,
        operands.scale_codebook,
    )
    return (
        *(None if tensor is None else contiguous(tensor) for tensor in tensors),
        rows,
        cols,
        operands.block_size,
        operands.scale_block_size,
    )


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself if it is contiguous: asking is cheaper than calling `Tensor.contiguous`."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def at_vector(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, contiguous and at a 16-byte boundary, which is a copy only for odd views."""
    tensor = contiguous(tensor.detach())
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
