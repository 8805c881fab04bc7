"""qlora_group: several qlora_linear of one x, which is cast, saved and differentiated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_kernels.autograd.common import bias_gradient, rows_of, shaped_like
from qlora_kernels.backends.kept import run_backward, run_forward
from qlora_kernels.formats.operands import WeightOperands
from qlora_kernels.ops.checks import autocast_input, check_adapter, check_parameter, check_x
from qlora_kernels.ops.dropout import draw_seed
from qlora_kernels.ops.qlora_group import member_fields
from qlora_kernels.reference.qlora_group import GroupMember

_forward = torch.ops.qlora_kernels.qlora_group.default
_backward = torch.ops.qlora_kernels.qlora_group_backward.default

_WEIGHT_TENSORS = WeightOperands._fields.index("shape")
# What a member contributes to the Function's arguments: the weight's tensors, lora_a, lora_b, bias
# and seed, which autograd must see one by one; and its numbers.
_TENSORS = _WEIGHT_TENSORS + 4
_Numbers = tuple[tuple[int, ...], int, int, float, float]


def _split(member: GroupMember) -> tuple[_Numbers, tuple[torch.Tensor | None, ...]]:
    weight = member.weight
    numbers = (*weight[_WEIGHT_TENSORS:], member.scaling, member.dropout_p)
    tensors = (
        *weight[:_WEIGHT_TENSORS],
        *(member.lora_a, member.lora_b, member.bias, member.seed),
    )
    return numbers, tensors  # type: ignore[return-value]


def _join(numbers: _Numbers, tensors: Sequence[Any]) -> GroupMember:
    shape, block_size, scale_block_size, *_ = numbers
    fields = (*tensors[:_WEIGHT_TENSORS], shape, block_size, scale_block_size)
    weight = WeightOperands(*fields)
    lora_a, lora_b, bias, seed = tensors[_WEIGHT_TENSORS:]
    return GroupMember(weight, lora_a, lora_b, numbers[3], bias, numbers[4], seed)


def _members(all_numbers: Sequence[_Numbers], tensors: Sequence[Any]) -> list[GroupMember]:
    return [
        _join(numbers, tensors[i * _TENSORS : (i + 1) * _TENSORS])
        for i, numbers in enumerate(all_numbers)
    ]


class QLoRAGroupFunction(torch.autograd.Function):
    """Every y [M,N] of x [M,K]. Saved for backward: x and xa [M, sum of R], each once, beside the
    parameters, and the members' Ŵ where that was requested (backends/kept.py).

    `places` says which of `tensors` is the next one of the members: torch.compile wants each tensor
    once. `release`: see `qlora_group_of`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        numbers: tuple[_Numbers, ...],
        places: tuple[int, ...],
        batch_invariant: bool,
        release: Callable[[], Callable[[], None] | None] | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        members = _members(numbers, [tensors[place] for place in places])
        (*ys, xa), dense = run_forward(
            _forward, ctx.needs_input_grad[0], x, *member_fields(members), batch_invariant
        )
        ctx.save_for_backward(x, xa, dense, *tensors)
        ctx.numbers, ctx.places, ctx.release = numbers, places, release
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: torch.Tensor | None) -> tuple[Any, ...]:
        if ctx.release is not None and (forget := ctx.release()) is not None:
            forget()
        x, xa, dense, *tensors = ctx.saved_tensors
        places, count = ctx.places, len(ctx.numbers)
        members = _members(ctx.numbers, [tensors[place] for place in places])
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        # Where the members' lora_a, lora_b and bias are among `tensors`.
        at_a, at_b, at_bias = (
            [places[i * _TENSORS + _WEIGHT_TENSORS + field] for i in range(count)]
            for field in range(3)
        )
        grads: list[Any] = [None] * len(tensors)
        grad_x = None
        flags = [needs_x, *(needs[at] for at in (*at_a, *at_b))]
        if any(flags):
            arguments = (x, list(grad_ys), xa, *member_fields(members), flags)
            results = run_backward(_backward, dense, *arguments)
            grad_x = results[0] if needs_x else None
            for at, needed, grad in zip((*at_a, *at_b), flags[1:], results[1:], strict=True):
                if needed:
                    grads[at] = _sum(grads[at], grad)
        for at, member, grad_y in zip(at_bias, members, grad_ys, strict=True):
            if needs[at] and member.bias is not None and grad_y is not None:
                grads[at] = _sum(grads[at], bias_gradient(grad_y, member.bias.dtype))
        return grad_x, None, None, None, None, *grads


def _sum(one: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Of the gradients of a tensor that several members share."""
    return other if one is None else one + other


def _each_once(
    tensors: Sequence[torch.Tensor | None],
) -> tuple[list[torch.Tensor | None], tuple[int, ...]]:
    """The different ones, and for each of `tensors` the place of it among them."""
    different: list[torch.Tensor | None] = []
    places = []
    for tensor in tensors:
        place = next((i for i, known in enumerate(different) if known is tensor), len(different))
        if place == len(different):
            different.append(tensor)
        places.append(place)
    return different, tuple(places)


def qlora_group_of(
    op: str,
    x: torch.Tensor,
    members: Sequence[GroupMember],
    batch_invariant: bool,
    release: Callable[[], Callable[[], None] | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Every member's [..., N] of x [..., K], as `qlora_linear` and `quantized_linear` give them.

    A member with dropout_p > 0 has no seed yet: seeds are drawn in the members' order, as separate
    layers would. `release` is a weak reference to what backward is to call.

    Raises:
        ArgumentTypeError, ArgumentError: as those functions; weights of several block sizes.
    """
    x = autocast_input(check_x(op, x, members[0].weight.shape[1], members[0].weight.codes.device))
    seeded = []
    for member in members:
        out_features, in_features = member.weight.shape
        check_x(op, x, in_features, member.weight.codes.device)
        if member.lora_a is not None:
            check_adapter(op, member.lora_a, member.lora_b, out_features, x)
        if member.bias is not None:
            check_parameter(op, "bias", member.bias, (out_features,), x)
        if member.dropout_p > 0.0:
            member = member._replace(seed=draw_seed(x.device))
        seeded.append(member)
    rows = rows_of(x)
    if torch.is_grad_enabled():
        numbers, tensors = zip(*map(_split, seeded), strict=True)
        flat = [tensor for each in tensors for tensor in each]
        places = tuple(range(len(flat)))
        if torch.compiler.is_compiling():
            flat, places = _each_once(flat)
        ys = QLoRAGroupFunction.apply(rows, numbers, places, batch_invariant, release, *flat)
    else:
        *ys, _ = _forward(rows, *member_fields(seeded), batch_invariant)
    return tuple(shaped_like(x, y) for y in ys)
