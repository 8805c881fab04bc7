"""The ops of several qlora_linear with one x: contracts with torch, every backend, odd sizes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.library import opcheck

import qlora_kernels as qlk
from qlora_kernels.backends.registry import entries
from qlora_kernels.errors import ArgumentError, BackendError
from qlora_kernels.ops.qlora_group import group_problem, member_fields
from qlora_kernels.reference.qlora_group import GroupMember, MemberNeeds
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.problems import DTYPES, QLoRAProblem, random_qlora, random_weight
from tests.tolerances import (
    assert_matmul,
    assert_matmul_backward,
    assert_qlora,
    assert_qlora_backward,
)

ops = torch.ops.qlora_kernels
BACKENDS = [entry.backend for entry in entries("qlora_group") if not entry.available()]
INVARIANT = [name for name in BACKENDS if name != "dense"]  # which refuses to be
# [N, K] and R of each member; R = 0: no adapter.
SIZES = (((40, 96), 4), ((17, 96), 0), ((65, 96), 9))


def problems(
    tokens: int, dtype: torch.dtype, dropout_p: float = 0.0, block_size: int = 32
) -> list[QLoRAProblem]:
    """Members with one x."""
    made = [
        random_qlora(
            tokens,
            random_weight(shape, block_size, ("absmax", "nested")[i % 2], seed=i),
            rank,
            dtype,
            torch.float32,
            bias_dtype=(torch.float32, None)[i % 2],
            dropout_p=dropout_p if i != 1 else 0.0,
            seed=i,
        )
        for i, (shape, rank) in enumerate(SIZES)
    ]
    return [p.with_x(made[0].x) for p in made]


def member(p: QLoRAProblem) -> GroupMember:
    adapter = (p.lora_a, p.lora_b) if len(p.lora_a) else (None, None)
    return GroupMember(p.weight, *adapter, p.scaling, p.bias, p.dropout_p, p.seed)


def forward(members: list[GroupMember], x: torch.Tensor, invariant: bool = False) -> list:
    *ys, xa = ops.qlora_group(x, *member_fields(members), invariant)
    return [ys, xa]


def backward(
    members: list[GroupMember], x: torch.Tensor, xa: torch.Tensor, grads: list, needs: MemberNeeds
) -> tuple:
    flags = [needs.x, *needs.lora_a, *needs.lora_b]
    grad_x, *rest = ops.qlora_group_backward(x, grads, xa, *member_fields(members), flags)
    return grad_x, rest[: len(members)], rest[len(members) :]


ALL = MemberNeeds(True, [True] * 3, [True] * 3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_member_is_as_accurate_as_alone(
    backend: str, dtype: torch.dtype, dropout_p: float
) -> None:
    for tokens in (1, 5, 70):
        group = problems(tokens, dtype, dropout_p)
        members, x = [member(p) for p in group], group[0].x
        with qlk.backend(backend):
            ys, xa = forward(members, x)
            parts = xa.split([m.rank for m in members], dim=1)
            for i, p in enumerate(group):
                # Of one member alone, so that its share of grad_x can be told.
                grads = [p.grad_y if j == i else None for j in range(len(group))]
                grad_x, grads_a, grads_b = backward(members, x, xa, grads, ALL)
                if members[i].rank:
                    assert_qlora(ys[i], parts[i], p)
                    assert_qlora_backward((grad_x, grads_a[i], grads_b[i]), p)
                else:
                    assert_matmul(ys[i], x, p.weight, p.bias)
                    assert_matmul_backward(grad_x, p.grad_y, p.weight)
                for j, m in enumerate(members):
                    if j != i and m.lora_a is not None:
                        assert not grads_a[j].any() and not grads_b[j].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_x_is_the_members_sum(backend: str, dtype: torch.dtype) -> None:
    for tokens, dropout_p in itertools.product((3, 70), (0.0, 0.3)):
        group = problems(tokens, dtype, dropout_p)
        members, x = [member(p) for p in group], group[0].x
        grads = [p.grad_y for p in group]
        with qlk.backend(backend):
            _, xa = forward(members, x)
            grad_x, grads_a, grads_b = backward(members, x, xa, grads, ALL)
            total = torch.zeros(x.shape, dtype=torch.float64)
            largest = 0.0
            for i in range(len(group)):
                only = [grad if j == i else None for j, grad in enumerate(grads)]
                part, part_a, part_b = backward(members, x, xa, only, ALL)
                total += part.double()
                largest = max(largest, float(part.double().abs().max()))
                # The sums of one adapter do not depend on the other members.
                unit = 4 * torch.finfo(torch.float32).eps
                torch.testing.assert_close(grads_a[i], part_a[i], rtol=unit * 70, atol=1e-4)
                torch.testing.assert_close(grads_b[i], part_b[i], rtol=unit * 70, atol=1e-4)
        # Each part, and each of the sums, is rounded once.
        bound = 6 * largest * torch.finfo(dtype).eps
        assert (grad_x.double() - total).abs().max() <= bound
        assert grad_x.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed(backend: str) -> None:
    group = problems(6, torch.bfloat16, 0.2)
    members, x, grads = [member(p) for p in group], group[0].x, [p.grad_y for p in group]
    with qlk.backend(backend):
        _, xa = forward(members, x)
        whole = backward(members, x, xa, grads, ALL)
        for needs_x, a, b in itertools.product([False, True], repeat=3):
            needs = MemberNeeds(needs_x, [a, False, b], [b, False, a])
            grad_x, grads_a, grads_b = backward(members, x, xa, grads, needs)
            assert_bitwise_equal(grad_x, whole[0] if needs_x else x.new_empty(0))
            for wanted, got, full in (
                (needs.lora_a, grads_a, whole[1]),
                (needs.lora_b, grads_b, whole[2]),
            ):
                for needed, mine, theirs in zip(wanted, got, full, strict=True):
                    assert_bitwise_equal(mine, theirs if needed else theirs.new_empty(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_no_gradients(backend: str) -> None:
    for tokens in (0, 4):
        group = problems(tokens, torch.float32)
        members, x = [member(p) for p in group], group[0].x
        with qlk.backend(backend):
            ys, xa = forward(members, x)
            assert [y.shape for y in ys] == [(tokens, 40), (tokens, 17), (tokens, 65)]
            assert xa.shape == (tokens, 13)
            grads = [p.grad_y if tokens == 0 else None for p in group]
            grad_x, grads_a, grads_b = backward(members, x, xa, grads, ALL)
        assert grad_x.shape == x.shape and not grad_x.any()
        assert not any(grad.any() for grad in (*grads_a, *grads_b))


@pytest.mark.parametrize("backend", INVARIANT)
def test_batch_invariant_rows(backend: str) -> None:
    group = problems(33, torch.float32)
    members, x = [member(p) for p in group], group[0].x
    with qlk.backend(backend):
        ys, xa = forward(members, x, True)
        for begin, end in ((0, 1), (30, 33)):
            part_ys, part_xa = forward(members, x[begin:end].clone(), True)
            for got, whole in zip((*part_ys, part_xa), (*ys, xa), strict=True):
                assert_bitwise_equal(got, whole[begin:end])


def test_opcheck() -> None:
    group = problems(5, torch.float32, 0.25)
    members, x = [member(p) for p in group], group[0].x
    fields = member_fields(members)
    opcheck(ops.qlora_group.default, (x, *fields, False))
    _, xa = forward(members, x)
    flags = [True, True, False, True, True, False, False]
    grads = [group[0].grad_y, None, group[2].grad_y]
    opcheck(ops.qlora_group_backward.default, (x, grads, xa, *fields, flags))


def test_autocast_does_not_reach_the_kernels() -> None:
    group = problems(5, torch.float32)
    members, x = [member(p) for p in group], group[0].x
    expected = forward(members, x)
    with qlk.backend("reference"), torch.autocast("cpu", torch.bfloat16):
        ys, _ = forward(members, x)
    for got, wanted in zip(ys, expected[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_what_cannot_be_computed_says_why() -> None:
    group = problems(5, torch.float32)
    other = dataclasses.replace(group[1], weight=random_weight((17, 96), 64))
    with pytest.raises(ArgumentError, match="qlora_group: block_size must be the same for all"):
        forward([member(group[0]), member(other)], group[0].x)
    with qlk.backend("triton"), pytest.raises(BackendError, match="qlora_group: the forced"):
        forward([member(p) for p in group], group[0].x)


def test_the_problem_of_a_group() -> None:
    group = problems(5, torch.bfloat16)
    problem = group_problem("qlora_group", group[0].x, [member(p) for p in group], True)
    sizes = (problem.tokens, problem.out_features, problem.in_features, problem.rank)
    assert sizes == (5, 40 + 17 + 65, 96, 13)
    assert problem.block_size == 32 and problem.double_quant and problem.batch_invariant
    text = qlk.explain("qlora_group", qlk.quantize(torch.randn(64, 64)), torch.float32)
    assert text.count("chosen") == 1
