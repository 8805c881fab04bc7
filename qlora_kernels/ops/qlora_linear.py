"""torch.ops.qlora_kernels.qlora_linear and qlora_linear_backward."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kernels.backends.registry import select
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.ops.library import WEIGHT, define
from qlora_kernels.ops.quantized_matmul import matmul_problem, operands_of

_WEIGHT_SIZE = len(WeightOperands._fields)
_SHAPE = WeightOperands._fields.index("shape")


def _fake_forward(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, lora_a = x.shape[0], arguments[_WEIGHT_SIZE]
    return x.new_empty(tokens, arguments[_SHAPE][0]), x.new_empty(tokens, lora_a.shape[0])


@define(
    f"qlora_linear(Tensor x, {WEIGHT}, Tensor lora_a, Tensor lora_b, float scaling, "
    "Tensor? bias=None, float dropout_p=0.0, Tensor? seed=None, bool batch_invariant=False) "
    "-> (Tensor, Tensor)",
    _fake_forward,
)
def run_qlora_linear(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The op's body: the kernel that the registry picks."""
    operands = operands_of(arguments)
    lora_a, lora_b, scaling, *rest = arguments[_WEIGHT_SIZE:]
    # The dispatcher leaves out trailing arguments that have their default.
    defaults: list[Any] = [None, 0.0, None, False]
    bias, dropout_p, seed, batch_invariant = [*rest, *defaults[len(rest) :]]
    problem = matmul_problem("qlora_linear", x, operands, lora_a.shape[0], batch_invariant)
    result: tuple[torch.Tensor, torch.Tensor] = select(problem).fn(
        x, operands, lora_a, lora_b, scaling, bias, dropout_p, seed, batch_invariant
    )
    return result


def _fake_backward(
    grad_y: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lora_a, lora_b = arguments[_WEIGHT_SIZE : _WEIGHT_SIZE + 2]
    needs_x, needs_a, needs_b = arguments[_WEIGHT_SIZE + 5]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        lora_a.new_empty(lora_a.shape if needs_a else (0,)),
        lora_b.new_empty(lora_b.shape if needs_b else (0,)),
    )


@define(
    f"qlora_linear_backward(Tensor grad_y, Tensor x, Tensor xa, {WEIGHT}, Tensor lora_a, "
    "Tensor lora_b, float scaling, float dropout_p, Tensor? seed, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
def run_qlora_linear_backward(
    grad_y: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op's body: the kernel that the registry picks."""
    operands = operands_of(arguments)
    lora_a, lora_b, scaling, dropout_p, seed, needs = arguments[_WEIGHT_SIZE:]
    problem = matmul_problem("qlora_linear_backward", grad_y, operands, lora_a.shape[0])
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = select(problem).fn(
        grad_y, x, xa, operands, lora_a, lora_b, scaling, dropout_p, seed, tuple(needs)
    )
    return result
