"""torch.ops.qlora_kernels.*: one op per stem and backward piece, its body a choice by the registry.

A weight crosses the border as plain tensors and numbers, in the order of `WEIGHT`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from qlora_kernels.backends.registry import Problem, select
from qlora_kernels.formats.packing import n_blocks, packed_size
from qlora_kernels.formats.quantized_weight import WeightOperands

NAMESPACE = "qlora_kernels"
WEIGHT = (
    "Tensor codes, Tensor? absmax, Tensor? scale_codes, Tensor? scale_absmax, "
    "Tensor? scale_offset, Tensor codebook, Tensor? scale_codebook, SymInt[] shape, "
    "int block_size, int scale_block_size"
)
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: define `schema` with the function as its body on every device.

    Returns the function as the op calls it, for callers that need no dispatcher (`runs_eagerly`).
    It runs with autocast off: a kernel that multiplies in fp32 means fp32. The first argument
    is a tensor, or a list of one or more.
    """
    name = schema.split("(")[0]

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def without_autocast(first: Any, *rest: Any) -> Any:
            device_type = (first[0] if isinstance(first, list) else first).device.type
            if not torch.is_autocast_enabled(device_type):
                return body(first, *rest)
            with torch.autocast(device_type, enabled=False):
                return body(first, *rest)

        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, without_autocast, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return without_autocast

    return decorate


def runs_eagerly(x: torch.Tensor) -> bool:
    """Whether an op on x may be called as the Python function it is, which saves about 10 µs.

    It may not where something has to see it in torch's dispatcher: tracing, transforms, dispatch
    modes, tensor subclasses.
    """
    return type(x) is torch.Tensor and nothing_traces()


def nothing_traces() -> bool:
    """Whether torch functions just run: nothing traces, transforms or watches them."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _fake_quantize(
    weight: torch.Tensor,
    boundaries: torch.Tensor,
    rank_codes: torch.Tensor,
    zero_code: int,
    block_size: int,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    numel = weight.numel()
    return (
        weight.new_empty(packed_size(numel), dtype=torch.uint8),
        weight.new_empty(n_blocks(numel, block_size), dtype=torch.float32),
    )


@define(
    "quantize(Tensor weight, Tensor boundaries, Tensor rank_codes, int zero_code, int block_size, "
    "Tensor? scales=None) -> (Tensor, Tensor)",
    _fake_quantize,
)
def _quantize(
    weight: torch.Tensor,
    boundaries: torch.Tensor,
    rank_codes: torch.Tensor,
    zero_code: int,
    block_size: int,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    problem = Problem(
        "quantize",
        weight.device.type,
        weight.dtype,
        in_features=weight.numel(),
        block_size=block_size,
    )
    kernel = select(problem).fn
    result: tuple[torch.Tensor, torch.Tensor] = kernel(
        weight, boundaries, rank_codes, zero_code, block_size, scales
    )
    return result


def _fake_double_quantize(
    absmax: torch.Tensor, scale_codebook: torch.Tensor, scale_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = absmax.numel()
    return (
        absmax.new_empty(blocks, dtype=torch.uint8),
        absmax.new_empty(n_blocks(blocks, scale_block_size)),
        absmax.new_empty(1),
    )


@define(
    "double_quantize(Tensor absmax, Tensor scale_codebook, int scale_block_size) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_double_quantize,
)
def _double_quantize(
    absmax: torch.Tensor, scale_codebook: torch.Tensor, scale_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    problem = Problem(
        "double_quantize",
        absmax.device.type,
        absmax.dtype,
        in_features=absmax.numel(),
        block_size=scale_block_size,
    )
    kernel = select(problem).fn
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = kernel(
        absmax, scale_codebook, scale_block_size
    )
    return result


def dequantize_problem(operands: WeightOperands, dtype: torch.dtype) -> Problem:
    """What the choice of a dequantize kernel sees."""
    numel = 1
    for size in operands.shape:
        numel *= size
    return Problem(
        "dequantize",
        operands.codes.device.type,
        dtype,
        in_features=numel,
        block_size=operands.block_size,
        double_quant=operands.absmax is None,
    )


def run_dequantize(
    operands: WeightOperands, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Pick a kernel and run it, into `out` if given."""
    kernel = select(dequantize_problem(operands, dtype)).fn
    result: torch.Tensor = kernel(operands, operands.shape, dtype, out)
    return result


def _fake_dequantize(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    shape, dtype = rest[6], rest[9]
    return codes.new_empty(shape, dtype=dtype)


@define(f"dequantize({WEIGHT}, ScalarType dtype) -> Tensor", _fake_dequantize)
def _dequantize(*arguments: Any) -> torch.Tensor:
    *weight, dtype = arguments
    return run_dequantize(WeightOperands(*weight)._replace(shape=tuple(weight[7])), dtype)


__all__ = [
    "NAMESPACE",
    "define",
    "dequantize_problem",
    "nothing_traces",
    "run_dequantize",
    "runs_eagerly",
]
