"""A layer's inference call as one native call: csrc/bindings/cpu_linear_inference.cpp."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from qlora_kernels.backends.cpu.common import FLOAT_DTYPES, machine_isa
from qlora_kernels.backends.cpu.matmul_path import TILE_LEAST_TOKENS, most_dot_tokens
from qlora_kernels.backends.cpu.qlora_linear import qlora_linear_cpu
from qlora_kernels.backends.cpu.quantized_matmul import quantized_matmul_cpu
from qlora_kernels.backends.registry import Problem, entries, forgotten_when_registering


class NativeLinear(NamedTuple):
    """torch.ops.qlora_kernels_cpu.linear_inference and arguments of it: most tokens of the dot
    products, fewest of tiles, level."""

    op: Any
    dot_tokens: int
    tile_tokens: int
    isa: int


@forgotten_when_registering
@functools.cache
def native_linear() -> NativeLinear | None:
    """The call, where it computes what the registry would choose for plain CPU tensors."""
    isa = machine_isa()
    if isa < 0:
        return None
    for op, ours in (
        ("quantized_matmul", quantized_matmul_cpu),
        ("qlora_linear", qlora_linear_cpu),
    ):
        for entry in entries(op):
            if any(entry.reason_against(problem) is None for problem in _problems(op)):
                if getattr(entry.fn, "func", None) is not ours:
                    return None
                break
    found = torch.ops.qlora_kernels_cpu.linear_inference.default
    # What an overload's __call__ calls, one frame of Python deeper.
    found = getattr(found, "_op", found)
    return NativeLinear(found, most_dot_tokens(isa, torch.float32), TILE_LEAST_TOKENS, isa)


def _problems(op: str) -> list[Problem]:
    """What the native call computes, as the registry sees it."""
    return [
        Problem(op, "cpu", dtype, tokens, 64, 64, rank=8, double_quant=True)
        for dtype in FLOAT_DTYPES
        for tokens in (1, 512)
    ]
