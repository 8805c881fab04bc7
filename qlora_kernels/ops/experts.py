"""torch.ops.qlora_kernels.experts_*: products with a stack of experts' matrices, each with the rows
of x that chose it.

How many rows that is, only the values say: the loop over experts is inside the op, so that tracing
sees one node of known shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qlora_kernels.formats.operands import StoredOperands
from qlora_kernels.ops.library import define
from qlora_kernels.ops.stored import (
    STORED,
    run_stored_matmul,
    run_stored_matmul_backward_input,
    run_stored_qlora_linear,
    run_stored_qlora_linear_backward,
)

_SIZE = len(StoredOperands._fields)
_SHAPE = StoredOperands._fields.index("shape")
_CODEBOOK = StoredOperands._fields.index("codebook")


def _experts(
    counts: torch.Tensor, weight: tuple[Any, ...]
) -> Iterator[tuple[int, slice, tuple[Any, ...]]]:
    """Each expert that has rows: its index, its rows of x, and its matrix.

    Args:
        counts: int64 [experts + 1], rows of each expert, and of none, in the order they are in.
        weight: StoredOperands whose tensors are stacked, shape that of one matrix; the codebook is
            stacked too, or one for all [16].
    """
    start = 0
    for expert, count in enumerate(counts.tolist()[:-1]):
        if count:
            own = [part[expert] if isinstance(part, torch.Tensor) else part for part in weight]
            if weight[_CODEBOOK].dim() == 1:
                own[_CODEBOOK] = weight[_CODEBOOK]
            yield expert, slice(start, start + count), tuple(own)
        start += count


def _fake_matmul(x: torch.Tensor, counts: torch.Tensor, *weight: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight[_SHAPE][0])


@define(f"experts_matmul(Tensor x, Tensor counts, {STORED}) -> Tensor", _fake_matmul)
def _experts_matmul(x: torch.Tensor, counts: torch.Tensor, *weight: Any) -> torch.Tensor:
    y = x.new_zeros(x.shape[0], weight[_SHAPE][0])
    for _, rows, own in _experts(counts, weight):
        y[rows] = run_stored_matmul(x[rows], *own)
    return y


def _fake_backward_input(grad_y: torch.Tensor, counts: torch.Tensor, *weight: Any) -> torch.Tensor:
    return grad_y.new_empty(grad_y.shape[0], weight[_SHAPE][1])


@define(
    f"experts_matmul_backward_input(Tensor grad_y, Tensor counts, {STORED}) -> Tensor",
    _fake_backward_input,
)
def _experts_matmul_backward_input(
    grad_y: torch.Tensor, counts: torch.Tensor, *weight: Any
) -> torch.Tensor:
    grad_x = grad_y.new_zeros(grad_y.shape[0], weight[_SHAPE][1])
    for _, rows, own in _experts(counts, weight):
        grad_x[rows] = run_stored_matmul_backward_input(grad_y[rows], *own)
    return grad_x


def _fake_qlora(
    x: torch.Tensor, counts: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, rank = x.shape[0], arguments[_SIZE].shape[1]
    return x.new_empty(rows, arguments[_SHAPE][0]), x.new_empty(rows, rank)


@define(
    f"experts_qlora_linear(Tensor x, Tensor counts, {STORED}, Tensor lora_a, Tensor lora_b, "
    "float scaling) -> (Tensor, Tensor)",
    _fake_qlora,
)
def _experts_qlora_linear(
    x: torch.Tensor, counts: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lora_a, lora_b, scaling = arguments[_SIZE:]
    y = x.new_zeros(x.shape[0], arguments[_SHAPE][0])
    xa = x.new_zeros(x.shape[0], lora_a.shape[1])
    for expert, rows, own in _experts(counts, arguments[:_SIZE]):
        y[rows], xa[rows] = run_stored_qlora_linear(
            x[rows], *own, lora_a[expert], lora_b[expert], scaling
        )
    return y, xa


def _fake_qlora_backward(
    grad_y: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, counts: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lora_a, lora_b, _, (needs_x, needs_a, needs_b) = arguments[_SIZE:]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        lora_a.new_empty(lora_a.shape if needs_a else (0,)),
        lora_b.new_empty(lora_b.shape if needs_b else (0,)),
    )


@define(
    f"experts_qlora_linear_backward(Tensor grad_y, Tensor x, Tensor xa, Tensor counts, {STORED}, "
    "Tensor lora_a, Tensor lora_b, float scaling, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _fake_qlora_backward,
)
def _experts_qlora_linear_backward(
    grad_y: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, counts: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lora_a, lora_b, scaling, needs = arguments[_SIZE:]
    grads = tuple(
        like.new_zeros(like.shape if needed else (0,))
        for like, needed in zip((x, lora_a, lora_b), needs, strict=True)
    )
    for expert, rows, own in _experts(counts, arguments[:_SIZE]):
        parts = run_stored_qlora_linear_backward(
            grad_y[rows],
            x[rows],
            xa[rows],
            *own,
            lora_a[expert],
            lora_b[expert],
            scaling,
            0.0,
            None,
            needs,
        )
        for grad, part, needed, at in zip(grads, parts, needs, (rows, expert, expert), strict=True):
            if needed:
                grad[at] = part
    grad_x, grad_a, grad_b = grads
    return grad_x, grad_a, grad_b
