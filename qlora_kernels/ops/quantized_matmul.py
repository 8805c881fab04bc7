"""torch.ops.qlora_kernels.quantized_matmul and quantized_matmul_backward_input."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kernels.backends.registry import Problem, select
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.ops.library import WEIGHT, define

_WEIGHT_SIZE = len(WeightOperands._fields)
_SHAPE = WeightOperands._fields.index("shape")


def matmul_problem(
    op: str,
    x: torch.Tensor,
    operands: WeightOperands,
    rank: int = 0,
    batch_invariant: bool = False,
) -> Problem:
    """What the choice of a matmul kernel sees; x (or grad_y) has one row a token."""
    out_features, in_features = operands.shape
    return Problem(
        op,
        x.device.type,
        x.dtype,
        tokens=x.shape[0],
        out_features=out_features,
        in_features=in_features,
        rank=rank,
        block_size=operands.block_size,
        double_quant=operands.absmax is None,
        batch_invariant=batch_invariant,
    )


def operands_of(arguments: tuple[Any, ...]) -> WeightOperands:
    """The weight out of an op's arguments that begin with it.

    Double-quantized scales without a table of their own get dynamic8's here rather than by the
    caller, whom torch.compile would have write its 256 values into every graph.
    """
    (
        codes,
        absmax,
        scale_codes,
        scale_absmax,
        scale_offset,
        codebook,
        scale_codebook,
        shape,
        block_size,
        scale_block_size,
    ) = arguments[:_WEIGHT_SIZE]
    if absmax is None and scale_codebook is None:
        scale_codebook = dynamic8_table(codes.device)
    return WeightOperands(
        codes,
        absmax,
        scale_codes,
        scale_absmax,
        scale_offset,
        codebook,
        scale_codebook,
        tuple(shape),
        block_size,
        scale_block_size,
    )


def _fake_matmul(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], arguments[_SHAPE][0])


@define(
    f"quantized_matmul(Tensor x, {WEIGHT}, Tensor? bias=None, bool batch_invariant=False) "
    "-> Tensor",
    _fake_matmul,
)
def run_quantized_matmul(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """The op's body: the kernel that the registry picks."""
    operands = operands_of(arguments)
    # The dispatcher leaves out trailing arguments that have their default.
    defaults: list[Any] = [None, False]
    given = arguments[_WEIGHT_SIZE:]
    bias, batch_invariant = [*given, *defaults[len(given) :]]
    problem = matmul_problem("quantized_matmul", x, operands, 0, batch_invariant)
    y: torch.Tensor = select(problem).fn(x, operands, bias, batch_invariant)
    return y


def _fake_backward_input(grad_y: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return grad_y.new_empty(grad_y.shape[0], arguments[_SHAPE][1])


@define(f"quantized_matmul_backward_input(Tensor grad_y, {WEIGHT}) -> Tensor", _fake_backward_input)
def run_quantized_matmul_backward_input(grad_y: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """The op's body: the kernel that the registry picks."""
    operands = operands_of(arguments)
    problem = matmul_problem("quantized_matmul_backward_input", grad_y, operands)
    grad_x: torch.Tensor = select(problem).fn(grad_y, operands)
    return grad_x
