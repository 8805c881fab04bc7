"""torch.ops.qlora_kernels.qlora_group and qlora_group_backward: several qlora_linear of one x.

The members come field by field, each a list; all weights have x's K columns, so that of their
shapes N is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qlora_kernels.backends.registry import Problem, select
from qlora_kernels.errors import argument_error
from qlora_kernels.formats.operands import WeightOperands
from qlora_kernels.ops.library import define
from qlora_kernels.ops.quantized_matmul import operands_of
from qlora_kernels.reference.qlora_group import GroupMember, MemberNeeds

_WEIGHTS = (
    "Tensor[] codes, Tensor?[] absmax, Tensor?[] scale_codes, Tensor?[] scale_absmax, "
    "Tensor?[] scale_offset, Tensor[] codebook, Tensor?[] scale_codebook, SymInt[] out_features, "
    "int[] block_size, int[] scale_block_size"
)
_ADAPTERS = (
    "Tensor?[] lora_a, Tensor?[] lora_b, float[] scaling, Tensor?[] bias, float[] dropout_p, "
    "Tensor?[] seed"
)
_WEIGHT_SIZE = len(WeightOperands._fields)
_SHAPE = WeightOperands._fields.index("shape")
_MEMBER_SIZE = _WEIGHT_SIZE + len(GroupMember._fields) - 1


def group_problem(
    op: str,
    x: torch.Tensor,
    members: Sequence[GroupMember],
    batch_invariant: bool = False,
) -> Problem:
    """What the choice of a kernel sees of a group: all its rows and ranks.

    Raises:
        ArgumentError: weights of several block sizes.
    """
    weights = [member.weight for member in members]
    sizes = {(weight.block_size, weight.scale_block_size) for weight in weights}
    if len(sizes) != 1:
        raise argument_error(op, "block_size", "the same for all members", sorted(sizes))
    return Problem(
        op,
        x.device.type,
        x.dtype,
        tokens=x.shape[0],
        out_features=sum(weight.shape[0] for weight in weights),
        in_features=x.shape[1],
        rank=sum(member.rank for member in members),
        block_size=weights[0].block_size,
        double_quant=any(weight.absmax is None for weight in weights),
        batch_invariant=batch_invariant,
    )


def member_fields(members: Sequence[GroupMember]) -> list[list[Any]]:
    """The members as the ops take them, field by field."""
    flat = [(*m.weight, *m[1:]) for m in members]
    fields: list[list[Any]] = [list(field) for field in zip(*flat, strict=True)]
    fields[_SHAPE] = [m.weight.shape[0] for m in members]
    return fields


def _members(x: torch.Tensor, fields: Sequence[Sequence[Any]]) -> list[GroupMember]:
    columns = list(fields)
    columns[_SHAPE] = [(rows, x.shape[1]) for rows in columns[_SHAPE]]
    return [
        GroupMember(operands_of(each[:_WEIGHT_SIZE]), *each[_WEIGHT_SIZE:])
        for each in zip(*columns, strict=True)
    ]


def _rank(lora_a: torch.Tensor | None) -> Any:
    return 0 if lora_a is None else lora_a.shape[0]


def _fake_forward(x: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    tokens, ranks = x.shape[0], [_rank(a) for a in arguments[_WEIGHT_SIZE]]
    ys = [x.new_empty(tokens, rows) for rows in arguments[_SHAPE]]
    return [*ys, x.new_empty(tokens, sum(ranks))]


@define(
    f"qlora_group(Tensor x, {_WEIGHTS}, {_ADAPTERS}, bool batch_invariant=False) -> Tensor[]",
    _fake_forward,
)
def _qlora_group(x: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    members = _members(x, arguments[:_MEMBER_SIZE])
    # The dispatcher leaves out trailing arguments that have their default.
    batch_invariant = arguments[_MEMBER_SIZE] if len(arguments) > _MEMBER_SIZE else False
    problem = group_problem("qlora_group", x, members, batch_invariant)
    ys, xa = select(problem).fn(x, members, batch_invariant)
    return [*ys, xa]


def _fake_backward(
    x: torch.Tensor, grad_y: Sequence[Any], xa: torch.Tensor, *arguments: Any
) -> list[torch.Tensor]:
    lora_a, lora_b = arguments[_WEIGHT_SIZE : _WEIGHT_SIZE + 2]
    needs = list(arguments[_MEMBER_SIZE])
    wanted = zip([*lora_a, *lora_b], needs[1:], strict=True)
    return [
        x.new_empty(x.shape if needs[0] else (0,)),
        *(
            x.new_empty(0) if each is None else each.new_empty(each.shape if needed else (0,))
            for each, needed in wanted
        ),
    ]


@define(
    f"qlora_group_backward(Tensor x, Tensor?[] grad_y, Tensor xa, {_WEIGHTS}, {_ADAPTERS}, "
    "bool[] needs) -> Tensor[]",
    _fake_backward,
)
def _qlora_group_backward(
    x: torch.Tensor, grad_y: Sequence[Any], xa: torch.Tensor, *arguments: Any
) -> list[torch.Tensor]:
    members = _members(x, arguments[:_MEMBER_SIZE])
    flags = list(arguments[_MEMBER_SIZE])
    needs = MemberNeeds(flags[0], flags[1 : 1 + len(members)], flags[1 + len(members) :])
    problem = group_problem("qlora_group_backward", x, members)
    grad_x, grads_a, grads_b = select(problem).fn(list(grad_y), x, xa, members, needs)
    return [grad_x, *grads_a, *grads_b]
