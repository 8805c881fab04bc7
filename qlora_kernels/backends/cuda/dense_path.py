"""Products with adapters for many tokens in CUDA: the Ŵ of one or several weights of the same x in
one scratch, then cuBLAS. `qlora_linear` is a group of one.

An adapter is further columns of Ŵ (forward) or rows (backward) where that moves less, and one GEMM
then sums all of a result in fp32 and rounds it once. The scratch of several weights, with N and R
of each (R padded) and K + T columns, T the sum of their ranks or 0:

    Ŵ_q | scaling·B_q 0 0
    A_q | -                   rows and columns that a pass does not need are undefined
    Ŵ_k | 0 scaling·B_k 0
    A_k | -
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qlora_kernels.backends import kept
from qlora_kernels.backends.cuda.common import contiguous
from qlora_kernels.backends.cuda.dequantize import dequantize_cuda, dequantize_many_cuda
from qlora_kernels.backends.cuda.dropout import dropout_cuda
from qlora_kernels.backends.cuda.extension_path import (
    copy_cost,
    extends,
    extends_forward,
    padded_rank,
)
from qlora_kernels.backends.cuda.low_rank import (
    copies_grad_y,
    project_into,
    projects_into,
    token_product,
    up_products,
)
from qlora_kernels.backends.cuda.scratch import dense_scratch
from qlora_kernels.reference.qlora_group import (
    GroupGradients,
    GroupMember,
    MemberNeeds,
    empty_gradients,
    rank_ranges,
)


def drops(member: GroupMember) -> bool:
    """Whether the member's adapter has an input of its own: dropout(x)."""
    return member.rank > 0 and member.seed is not None and member.dropout_p > 0.0


def stacked(adapters: Sequence[torch.Tensor]) -> torch.Tensor:
    """lora_a's below one another, in fp32 where dtypes differ; one alone as it is."""
    parts = [contiguous(adapter.detach()) for adapter in adapters]
    if len(parts) == 1:
        return parts[0]
    same = len({part.dtype for part in parts}) == 1
    return torch.cat(parts if same else [part.float() for part in parts])


def dense_forward(
    x: torch.Tensor, members: Sequence[GroupMember]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every y [M,N] and xa [M, sum of R] of x [M,K].

    The ys are GEMMs of their own on a common [x | xa of all]: one GEMM over all N would leave them
    interleaved, and separating them costs a pass over each, more than reading x again. An infinite
    or NaN xa of a token makes that token's y of all members NaN.
    """
    x = contiguous(x.detach())
    cols, ranges = x.shape[1], rank_ranges(members)
    rank = ranges[-1][1]
    one_pass = not any(map(drops, members)) and projects_into(x, rank)
    rows = sum(m.weight.shape[0] for m in members)
    width = padded_rank(rank) if rank and extends_forward(rows, cols, one_pass) else 0
    xa, left = _project(x, members, width, one_pass)
    scratch, firsts = _dense_weights(members, x, width)
    if width:
        _append_columns(scratch, firsts, members, ranges)
    ys = []
    for m, first, (begin, end) in zip(members, firsts, ranges, strict=True):
        weight = scratch[first : first + m.weight.shape[0], : left.shape[1]]
        y = F.linear(left, weight, None if m.bias is None else m.bias.detach().to(x.dtype))
        if m.lora_b is not None and m.rank and not width:
            b = m.lora_b.detach().to(x.dtype)
            y.addmm_(xa[:, begin:end], b.t(), alpha=m.scaling)
        ys.append(y)
    if kept.is_wanted():
        # All of it now: a saved tensor must not be written to later.
        _append_rows(scratch, firsts, members)
        kept.leave(scratch)
    return ys, xa


def dense_backward(
    grad_ys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    xa: torch.Tensor,
    members: Sequence[GroupMember],
    needs: MemberNeeds,
) -> GroupGradients:
    """grad_x, and grad_a and grad_b of every member, empty where not needed.

    grad_x is one GEMM, [grad_y | u | 0 | grad_y | u | 0 …] · [Ŵ ; A ; 0 ; Ŵ ; A ; 0 …], or summed
    in place, whichever moves less.
    """
    x = contiguous(x.detach())
    grads_a, grads_b = empty_gradients(x, members, needs)
    grads = {i: grad.detach() for i, grad in enumerate(grad_ys) if grad is not None}
    left = _LeftOperand.of(x, members, grads, needs) if needs.x else None
    us: dict[int, torch.Tensor] = {}
    for i, (begin, end) in enumerate(rank_ranges(members)):
        if i not in grads:
            continue
        columns = left.columns(i) if left else None
        need_u = needs.x or needs.lora_a[i]
        u, grad_b, written = None, None, False
        if members[i].rank and (need_u or needs.lora_b[i]):
            u, grad_b, written = up_products(
                *(grads[i], xa[:, begin:end], members[i].lora_b, members[i].scaling),
                *(need_u, needs.lora_b[i], columns),
            )
        if u is not None:
            us[i] = u
        if grad_b is not None:
            grads_b[i] = grad_b
        if columns is not None and not written:
            write_extended(grads[i], None if drops(members[i]) else u, columns)
    _down_gradients(x, us, members, needs, grads_a)
    if not needs.x:
        return x.new_empty(0), grads_a, grads_b
    if not grads:
        return torch.zeros_like(x), grads_a, grads_b
    return _input_gradient(x, left, grads, us, members), grads_a, grads_b


def write_extended(
    left: torch.Tensor, low_rank: torch.Tensor | None, extended: torch.Tensor
) -> None:
    """extended = [left | low_rank | 0]."""
    cols = left.shape[1]
    extended[:, :cols] = left
    behind = cols if low_rank is None else cols + low_rank.shape[1]
    if low_rank is not None:
        extended[:, cols:behind] = low_rank
    if behind < extended.shape[1]:
        extended[:, behind:] = 0


def _project(
    x: torch.Tensor, members: Sequence[GroupMember], width: int, one_pass: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """xa [M, sum of R] and the forward's left operand, x or with `width` [x | xa | 0]. Adapters
    whose input is x share its one pass."""
    sharing = [m.lora_a for m in members if m.lora_a is not None and m.rank and not drops(m)]
    extended = x.new_empty(len(x), x.shape[1] + width) if width else None
    if one_pass and extended is not None:
        return project_into(x, stacked(sharing), extended), extended
    ranks = [len(a) for a in sharing]
    products = F.linear(x, stacked(sharing).to(x.dtype)) if sharing else x.new_empty(len(x), 0)
    if any(map(drops, members)):
        own = iter(products.split(ranks, dim=1))
        parts = [
            F.linear(dropout_cuda(x, m.dropout_p, m.seed), m.lora_a.detach().to(x.dtype))
            if drops(m) and m.lora_a is not None
            else next(own)
            for m in members
            if m.rank
        ]
        products = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if extended is None:
        return products, x
    write_extended(x, products, extended)
    return products, extended


def _dense_weights(
    members: Sequence[GroupMember], like: torch.Tensor, width: int = 0
) -> tuple[torch.Tensor, list[int]]:
    """The scratch with every Ŵ in it, decoded by one launch, and each one's first row."""
    cols = members[0].weight.shape[1]
    firsts, total = _first_rows(members)
    if kept.is_wanted():
        scratch = like.new_empty(total, cols + width)
    else:
        scratch = dense_scratch(total, cols + width, like)
    outs = [
        scratch[first : first + m.weight.shape[0], :cols]
        for m, first in zip(members, firsts, strict=True)
    ]
    if len(members) == 1:
        weight = members[0].weight
        dequantize_cuda(weight, weight.shape, like.dtype, outs[0])
    else:
        dequantize_many_cuda([m.weight for m in members], like.dtype, outs)
    return scratch, firsts


def _first_rows(members: Sequence[GroupMember]) -> tuple[list[int], int]:
    """Where each Ŵ begins in the scratch, and the scratch's rows."""
    firsts, total = [], 0
    for m in members:
        firsts.append(total)
        total += m.weight.shape[0] + _rows_behind(m)
    return firsts, total


def _rows_behind(member: GroupMember) -> int:
    """Rows that a member's adapter takes in the backward: none under dropout, whose mask applies to
    its term alone."""
    return 0 if drops(member) else padded_rank(member.rank)


def _append_columns(
    scratch: torch.Tensor,
    firsts: Sequence[int],
    members: Sequence[GroupMember],
    ranges: Sequence[tuple[int, int]],
) -> None:
    cols = members[0].weight.shape[1]
    scratch[:, cols:] = 0
    for m, first, (begin, end) in zip(members, firsts, ranges, strict=True):
        if m.lora_b is not None and m.rank:
            # In fp32, so that the product is rounded once, like B itself where scaling is a power
            # of two.
            b = m.lora_b.detach().to(scratch.dtype).float() * m.scaling
            scratch[first : first + len(b), cols + begin : cols + end] = b


def _append_rows(
    scratch: torch.Tensor, firsts: Sequence[int], members: Sequence[GroupMember]
) -> None:
    cols = members[0].weight.shape[1]
    for m, first in zip(members, firsts, strict=True):
        if m.lora_a is not None and _rows_behind(m):
            behind = first + m.weight.shape[0]
            scratch[behind : behind + m.rank, :cols] = m.lora_a.detach()
            scratch[behind + m.rank : behind + _rows_behind(m), :cols] = 0


class _LeftOperand:
    """[grad_y | u | 0] of every member beside one another, for grad_x as one GEMM."""

    def __init__(self, tokens: torch.Tensor, widths: dict[int, int]) -> None:
        self._widths = widths
        self.matrix = tokens.new_empty(len(tokens), sum(widths.values()))

    @staticmethod
    def of(
        x: torch.Tensor,
        members: Sequence[GroupMember],
        grads: dict[int, torch.Tensor],
        needs: MemberNeeds,
    ) -> _LeftOperand | None:
        """None where summing the products in place moves less."""
        copied, joining = 0, 0
        for i, grad_y in grads.items():
            m = members[i]
            one_pass = (
                m.lora_b is not None
                and needs.lora_b[i]
                and copies_grad_y(grad_y, m.rank, m.lora_b.dtype)
            )
            copied += copy_cost(m.weight.shape[0], one_pass)
            joining += _rows_behind(m)
        # Adapters that join are one product, whatever their number.
        products = len(grads) + (1 if joining else 0)
        # What the forward left has the rows of all of them.
        left_out = len(grads) < len(members) and _given(members, x) is not None
        if left_out or not extends(copied, products, x.shape[1]):
            return None
        widths = {i: members[i].weight.shape[0] + _rows_behind(members[i]) for i in grads}
        return _LeftOperand(x, widths)

    def columns(self, index: int) -> torch.Tensor:
        """The member's own."""
        first = sum(width for i, width in self._widths.items() if i < index)
        return self.matrix[:, first : first + self._widths[index]]


def _given(members: Sequence[GroupMember], x: torch.Tensor) -> torch.Tensor | None:
    """The scratch that the forward left, with every A in it."""
    return kept.given(_first_rows(members)[1], x)


def _input_gradient(
    x: torch.Tensor,
    left: _LeftOperand | None,
    grads: dict[int, torch.Tensor],
    us: dict[int, torch.Tensor],
    members: Sequence[GroupMember],
) -> torch.Tensor:
    """grad_x [M,K], once the left operand is written, if there is one."""
    used = [members[i] for i in grads]
    cols = x.shape[1]
    right = _given(members, x)
    if right is not None:
        firsts = dict(enumerate(_first_rows(members)[0]))
        right = right[:, :cols]
    else:
        right, found = _dense_weights(used, x)
        firsts = dict(zip(grads, found, strict=True))
        if left is not None:
            _append_rows(right, found, used)
    grad_x = _summed(right, firsts, grads, us, members) if left is None else left.matrix @ right
    for i, u in us.items():
        m = members[i]
        if m.lora_a is not None and drops(m):
            through_adapter = u @ m.lora_a.detach().to(x.dtype)
            grad_x.add_(dropout_cuda(through_adapter, m.dropout_p, m.seed))
    return grad_x


def _summed(
    right: torch.Tensor,
    firsts: dict[int, int],
    grads: dict[int, torch.Tensor],
    us: dict[int, torch.Tensor],
    members: Sequence[GroupMember],
) -> torch.Tensor:
    """The products grad_y Ŵ added up in place, and the adapters' u A as one product."""
    weights = {i: right[firsts[i] : firsts[i] + members[i].weight.shape[0]] for i in grads}
    first, *others = grads
    grad_x = grads[first] @ weights[first]
    for i in others:
        grad_x.addmm_(grads[i], weights[i])
    joining = [i for i in us if not drops(members[i])]
    if joining:
        parts = [us[i] for i in joining]
        u = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        grad_x.addmm_(u, _stacked_of(members, joining).to(grad_x.dtype))
    return grad_x


def _stacked_of(members: Sequence[GroupMember], indices: Sequence[int]) -> torch.Tensor:
    adapters = (members[i].lora_a for i in indices)
    return stacked([adapter for adapter in adapters if adapter is not None])


def _down_gradients(
    x: torch.Tensor,
    us: dict[int, torch.Tensor],
    members: Sequence[GroupMember],
    needs: MemberNeeds,
    grads_a: list[torch.Tensor],
) -> None:
    """Writes grad_a [R,K] = uᵀ dropout(x) where needed: one pass over x for all adapters whose
    input it is."""
    wanted = [i for i in us if needs.lora_a[i]]
    sharing = [i for i in wanted if not drops(members[i])]
    if len(sharing) > 1:
        u = torch.cat([us[i] for i in sharing], dim=1)
        together = token_product(x, u, 1.0, _stacked_of(members, sharing).dtype, rank_major=True)
        parts = together.split([us[i].shape[1] for i in sharing])
        for i, part in zip(sharing, parts, strict=True):
            # A copy: gradients that share memory would keep all of it.
            grads_a[i] = part.to(grads_a[i].dtype, copy=True)
    for i in wanted:
        if len(sharing) > 1 and i in sharing:
            continue
        m = members[i]
        own = dropout_cuda(x, m.dropout_p, m.seed) if drops(m) else x
        grads_a[i] = token_product(own, us[i], 1.0, grads_a[i].dtype, rank_major=True)
