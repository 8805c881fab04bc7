"""qlora_group and its backward with Triton: one pass over x for all adapters, each way.

Adapters whose input is x itself share x·[A; A; …]ᵀ and [u | u | …]ᵀ·x. An adapter under dropout has
an input of its own: it takes the passes of qlora_linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlora_kernels.backends.launch_config import (
    choose_path,
    extends_forward,
    extends_group_backward,
    tile_rank,
)
from qlora_kernels.backends.triton.common import register_triton_kernel
from qlora_kernels.backends.triton.dequantize import dequantize_many_triton
from qlora_kernels.backends.triton.explained import matmul_path
from qlora_kernels.backends.triton.low_rank import (
    down_gradient_launches,
    down_launches,
    run_all,
    up_gradient_launches,
)
from qlora_kernels.backends.triton.qlora_linear import qlora_linear_triton
from qlora_kernels.backends.triton.quantized_matmul import (
    Down,
    Up,
    dense_weight,
    matmul_rejects,
    product,
    product_backward,
    sizes_of,
)
from qlora_kernels.reference.qlora_group import (
    GroupGradients,
    GroupMember,
    MemberNeeds,
    empty_gradients,
    rank_ranges,
)


class _Adapter(NamedTuple):
    """A member's adapter, its place among the members and its columns in their common products."""

    number: int
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    begin: int
    end: int


@register_triton_kernel("qlora_group", rejects=matmul_rejects, path=matmul_path)
def qlora_group_triton(
    x: torch.Tensor, members: Sequence[GroupMember], batch_invariant: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every y and xa; see `reference.qlora_group_reference`."""
    x = x.contiguous()
    shared, xa_shared, extended = _shared_down(x, members, batch_invariant)
    ys, parts = [], [x.new_empty(len(x), 0)]
    for i, m in enumerate(members):
        adapter = shared.get(i)
        if adapter is not None:
            xa = xa_shared[:, adapter.begin : adapter.end].contiguous()
            if extended is not None:
                ys.append(_extended_product(extended, m, adapter))
            else:
                up = Up(adapter.lora_b.contiguous(), xa, m.scaling)
                ys.append(product(x, m.weight, m.bias, up, batch_invariant))
        elif m.lora_a is not None and m.lora_b is not None:
            y, xa = qlora_linear_triton(
                *(x, m.weight, m.lora_a, m.lora_b, m.scaling),
                *(m.bias, m.dropout_p, m.seed, batch_invariant),
            )
            ys.append(y)
        else:
            ys.append(product(x, m.weight, m.bias, None, batch_invariant))
            continue
        parts.append(xa)
    return ys, torch.cat(parts, dim=1)


@register_triton_kernel("qlora_group_backward", path=matmul_path)
def qlora_group_backward_triton(
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x, grad_a, grad_b; see `reference.qlora_group_backward_reference`. grad_x is one GEMM
    over all rows of all weights, or summed member by member in the kernels that make it."""
    x = x.contiguous()
    grads = {i: grad.contiguous() for i, grad in enumerate(grad_ys) if grad is not None}
    grads_a, grads_b = empty_gradients(x, members, needs)
    ranges = rank_ranges(members)
    us = x.new_empty(len(x), xa.shape[1])
    stack = _Stack.of(x, members, grads) if needs.x else None
    for i, grad_y in grads.items():
        m, (begin, end) = members[i], ranges[i]
        if m.lora_a is None or m.lora_b is None or not len(x) * m.rank * grad_y.shape[1]:
            if stack is not None:
                stack.columns(i, grad_y.shape[1]).copy_(grad_y)
            continue
        if _drops_all(m):
            continue
        need_u = needs.x or needs.lora_a[i]
        if needs.lora_b[i]:
            grads_b[i] = torch.empty_like(m.lora_b, memory_format=torch.contiguous_format)
        if need_u or needs.lora_b[i]:
            run_all(
                up_gradient_launches(
                    grad_y,
                    xa[:, begin:end].contiguous(),
                    m.lora_b.contiguous(),
                    m.scaling,
                    us[:, begin:end] if need_u else None,
                    grads_b[i] if needs.lora_b[i] else None,
                    extended=None if stack is None else stack.columns(i),
                )
            )
    _down_gradients(x, us, members, grads, needs, grads_a)
    if not needs.x:
        return x.new_empty(0), grads_a, grads_b
    if stack is not None:
        return stack.product(members), grads_a, grads_b
    grad_x = None
    for i, grad_y in grads.items():
        m, (begin, end) = members[i], ranges[i]
        down = None
        if m.lora_a is not None and not _drops_all(m) and len(x) * m.rank * grad_y.shape[1]:
            seed = m.seed if m.dropout_p else None
            down = Down(m.lora_a.contiguous(), us[:, begin:end].contiguous(), m.dropout_p, seed)
        grad_x = product_backward(grad_y, m.weight, down, grad_x)
    return torch.zeros_like(x) if grad_x is None else grad_x, grads_a, grads_b


def _drops(member: GroupMember) -> bool:
    return member.seed is not None and member.dropout_p > 0.0


def _drops_all(member: GroupMember) -> bool:
    return member.seed is not None and member.dropout_p == 1.0


def _stacked(adapters: Sequence[_Adapter]) -> torch.Tensor:
    """Their lora_a below one another, in fp32 where dtypes differ."""
    parts = [adapter.lora_a for adapter in adapters]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.float() for part in parts]
    return torch.cat(parts)


def _sharing(members: Sequence[GroupMember], candidates: Sequence[int]) -> list[_Adapter]:
    """Adapters whose input is x itself, if there are two or more."""
    found: list[_Adapter] = []
    begin = 0
    for i in candidates:
        m = members[i]
        if m.lora_a is not None and m.lora_b is not None and m.rank and not _drops(m):
            found.append(_Adapter(i, m.lora_a, m.lora_b, begin, begin + m.rank))
            begin += m.rank
    return found if len(found) > 1 else []


def _shared_down(
    x: torch.Tensor, members: Sequence[GroupMember], batch_invariant: bool
) -> tuple[dict[int, _Adapter], torch.Tensor, torch.Tensor | None]:
    """Adapters that share x·Aᵀ, that product, and [x | scaling·product] where GEMMs want it."""
    adapters = _sharing(members, range(len(members))) if x.numel() else []
    if not adapters:
        return {}, x.new_empty(len(x), 0), None
    rank, cols = adapters[-1].end, x.shape[1]
    xa = x.new_empty(len(x), rank)
    extended, scaling = None, members[adapters[0].number].scaling
    sharing = [members[adapter.number] for adapter in adapters]
    rows = sum(m.weight.shape[0] for m in sharing)
    if (
        all(choose_path(sizes_of(x, m.weight, batch_invariant)) == "dense" for m in sharing)
        and all(m.scaling == scaling for m in sharing)
        and extends_forward(len(x), rows, cols, rank)
    ):
        extended = x.new_empty(len(x), cols + tile_rank(rank))
    run_all(
        down_launches(
            *(x, _stacked(adapters), 0.0, None, xa),
            extended=extended,
            scaling=scaling,
            batch_invariant=batch_invariant,
        )
    )
    return {adapter.number: adapter for adapter in adapters}, xa, extended


def _extended_product(
    extended: torch.Tensor, member: GroupMember, adapter: _Adapter
) -> torch.Tensor:
    """[x | scaling·xa of all] · [Ŵ | 0 | B | 0]ᵀ + bias."""
    cols = member.weight.shape[1]
    weight = dense_weight(member.weight, extended.dtype, more_cols=extended.shape[1] - cols)
    weight[:, cols:] = 0
    weight[:, cols + adapter.begin : cols + adapter.end] = adapter.lora_b
    if member.bias is None:
        return torch.mm(extended, weight.t())
    return torch.addmm(member.bias.to(extended.dtype), extended, weight.t())


def _down_gradients(
    x: torch.Tensor,
    us: torch.Tensor,
    members: Sequence[GroupMember],
    grads: dict[int, torch.Tensor],
    needs: MemberNeeds,
    grads_a: list[torch.Tensor],
) -> None:
    """Writes grad_a [R,K] = uᵀ dropout(x) where needed; us [M, sum of R] are the members' u."""
    if not x.numel():
        return
    ranges = rank_ranges(members)
    wanted = [i for i in grads if needs.lora_a[i] and members[i].rank and grads[i].numel()]
    shared = _sharing(members, wanted)
    if shared:
        u = torch.cat([us[:, slice(*ranges[adapter.number])] for adapter in shared], dim=1)
        together = x.new_empty(u.shape[1], x.shape[1], dtype=torch.float32)
        run_all(down_gradient_launches(x, u, 0.0, None, together))
        for adapter in shared:
            # A copy: gradients that share memory would keep all of it.
            part = together[adapter.begin : adapter.end]
            grads_a[adapter.number] = part.to(adapter.lora_a.dtype, copy=True)
    for i in set(wanted) - {adapter.number for adapter in shared}:
        m = members[i]
        assert m.lora_a is not None
        if _drops_all(m):
            continue
        u = us[:, slice(*ranges[i])].contiguous()
        grads_a[i] = torch.empty_like(m.lora_a, memory_format=torch.contiguous_format)
        seed = m.seed if m.dropout_p else None
        run_all(down_gradient_launches(x, u, m.dropout_p, seed, grads_a[i]))


class _Stack:
    """grad_x [M,K] as one GEMM: [grad_y | u | 0 | grad_y | u | 0 …] · [Ŵ ; A ; 0 ; Ŵ ; A ; 0 …]."""

    def __init__(
        self, x: torch.Tensor, members: Sequence[GroupMember], grads: dict[int, torch.Tensor]
    ) -> None:
        self._first: dict[int, int] = {}
        total = 0
        for i in grads:
            self._first[i] = total
            total += members[i].weight.shape[0] + _pad(members[i])
        self._left = x.new_empty(len(x), total)
        for i in grads:
            behind = self._first[i] + members[i].weight.shape[0] + members[i].rank
            self._left[:, behind : behind + _pad(members[i]) - members[i].rank] = 0

    @staticmethod
    def of(
        x: torch.Tensor, members: Sequence[GroupMember], grads: dict[int, torch.Tensor]
    ) -> _Stack | None:
        """The stack, or None where summing member by member costs less."""
        used = [members[i] for i in grads]
        rows = sum(m.weight.shape[0] for m in used)
        most = max((m.rank for m in used), default=0)
        worth = (
            len(used) > 1
            and x.numel() > 0
            and not any(_drops(m) for m in used)
            and all(
                choose_path(sizes_of(grads[i], members[i].weight, False)) == "dense" for i in grads
            )
            and extends_group_backward(len(x), rows, x.shape[1], len(used), most)
        )
        return _Stack(x, members, grads) if worth else None

    def columns(self, index: int, count: int | None = None) -> torch.Tensor:
        """The left operand from where the member begins, `count` columns or all."""
        first = self._first[index]
        return self._left[:, first : None if count is None else first + count]

    def product(self, members: Sequence[GroupMember]) -> torch.Tensor:
        """grad_x, once every member's columns are written."""
        cols = members[next(iter(self._first))].weight.shape[1]
        right = self._left.new_empty(self._left.shape[1], cols)
        weights, outs = [], []
        for i, first in self._first.items():
            m = members[i]
            rows = m.weight.shape[0]
            weights.append(m.weight)
            outs.append(right[first : first + rows])
            if m.lora_a is not None:
                right[first + rows : first + rows + m.rank] = m.lora_a
                right[first + rows + m.rank : first + rows + _pad(m)] = 0
        dequantize_many_triton(weights, right.dtype, outs)
        return torch.mm(self._left, right)


def _pad(member: GroupMember) -> int:
    return tile_rank(member.rank) if member.rank else 0
