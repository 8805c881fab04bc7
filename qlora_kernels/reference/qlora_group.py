"""qlora_group: several qlora_linear of one x [M,K], and their gradients.

A member is a weight [N,K], its adapter or none, bias, dropout. Rounding order: every y, grad_a and
grad_b is that of `qlora_linear` (without an adapter, of `quantized_matmul`). grad_x is the sum of
the members', each rounded to x's dtype and then added, the last member first: what autograd makes
of separate layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference.qlora_linear import (
    qlora_linear_backward_reference,
    qlora_linear_reference,
)
from qlora_kernels.reference.quantized_matmul import (
    quantized_matmul_backward_input_reference,
    quantized_matmul_reference,
)


class GroupMember(NamedTuple):
    """One of the layers: weight [N,K]; lora_a [R,K] and lora_b [N,R], or neither; bias [N] or
    None; dropout_p and seed as in `qlora_linear`."""

    weight: WeightOperands
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    scaling: float
    bias: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None

    @property
    def rank(self) -> int:
        """R, 0 without an adapter."""
        return 0 if self.lora_a is None else self.lora_a.shape[0]


class MemberNeeds(NamedTuple):
    """Which gradients of a group are wanted: of x, and of each member's adapter."""

    x: bool
    lora_a: Sequence[bool]
    lora_b: Sequence[bool]


class MemberKernels(NamedTuple):
    """The ops on one weight that a group can be computed with, member by member."""

    matmul: Callable[..., torch.Tensor]
    matmul_backward_input: Callable[..., torch.Tensor]
    qlora: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    qlora_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


GroupGradients = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


def rank_ranges(members: Sequence[GroupMember]) -> list[tuple[int, int]]:
    """Each member's columns [begin, end) of xa [M, sum of R]."""
    ranges, begin = [], 0
    for member in members:
        ranges.append((begin, begin + member.rank))
        begin += member.rank
    return ranges


def forward_by_members(
    kernels: MemberKernels,
    x: torch.Tensor,
    members: Sequence[GroupMember],
    batch_invariant: bool = False,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every y [M,N] and xa [M, sum of R], one member after the other."""
    ys, products = [], [x.new_empty(x.shape[0], 0)]
    for m in members:
        if m.lora_a is None:
            ys.append(kernels.matmul(x, m.weight, m.bias, batch_invariant))
            continue
        y, xa = kernels.qlora(
            *(x, m.weight, m.lora_a, m.lora_b, m.scaling),
            *(m.bias, m.dropout_p, m.seed, batch_invariant),
        )
        ys.append(y)
        products.append(xa)
    return ys, torch.cat(products, dim=1)


def backward_by_members(
    kernels: MemberKernels,
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x, and grad_a and grad_b of each member, empty where not needed; the grad_x of one
    member at a time exists beside their sum."""
    grad_x: torch.Tensor | None = None
    grads_a, grads_b = empty_gradients(x, members, needs)
    for i, (begin, end) in reversed(list(enumerate(rank_ranges(members)))):
        m, grad_y = members[i], grad_ys[i]
        if grad_y is None:
            continue
        part: Any = None
        wanted = (needs.x, needs.lora_a[i], needs.lora_b[i])
        if m.lora_a is not None and any(wanted):
            part, grad_a, grad_b = kernels.qlora_backward(
                *(grad_y, x, xa[:, begin:end].contiguous(), m.weight, m.lora_a, m.lora_b),
                *(m.scaling, m.dropout_p, m.seed, wanted),
            )
            grads_a[i] = grad_a if needs.lora_a[i] else grads_a[i]
            grads_b[i] = grad_b if needs.lora_b[i] else grads_b[i]
        elif m.lora_a is None and needs.x:
            part = kernels.matmul_backward_input(grad_y, m.weight)
        if needs.x:
            grad_x = part if grad_x is None else grad_x.add_(part)
    if grad_x is None:
        grad_x = torch.zeros_like(x) if needs.x else x.new_empty(0)
    return grad_x, grads_a, grads_b


def empty_gradients(
    x: torch.Tensor, members: Sequence[GroupMember], needs: MemberNeeds
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """grad_a and grad_b of members whose y got no gradient: zeros where needed, else empty."""
    grads_a: list[torch.Tensor] = []
    grads_b: list[torch.Tensor] = []
    for i, m in enumerate(members):
        for grads, tensor, needed in (
            (grads_a, m.lora_a, needs.lora_a[i]),
            (grads_b, m.lora_b, needs.lora_b[i]),
        ):
            if tensor is None:
                grads.append(x.new_empty(0))
            else:
                grads.append(torch.zeros_like(tensor) if needed else tensor.new_empty(0))
    return grads_a, grads_b


_KERNELS = MemberKernels(
    quantized_matmul_reference,
    quantized_matmul_backward_input_reference,
    qlora_linear_reference,
    qlora_linear_backward_reference,
)


def qlora_group_reference(
    x: torch.Tensor, members: Sequence[GroupMember], batch_invariant: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """y [M,N] of every member, and xa [M, sum of R], the only product the backward needs."""
    return forward_by_members(_KERNELS, x, members, batch_invariant)


def qlora_group_backward_reference(
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x [M,K], grad_a [R,K] and grad_b [N,R] of every member; None in grad_ys [M,N]: that y
    was not used."""
    return backward_by_members(_KERNELS, grad_ys, x, xa, members, needs)
