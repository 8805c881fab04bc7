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
from qlora_kernels.reference.qlora_group import MemberNeeds
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.group_checks import (
    ALL,
    CPU,
    backward,
    check_invariance,
    check_members,
    check_needs,
    check_sums,
    forward,
    member,
    problems,
)
from tests.problems import DTYPES, random_weight

ops = torch.ops.qlora_kernels
BACKENDS = [entry.backend for entry in entries("qlora_group") if not entry.available()]
INVARIANT = [name for name in BACKENDS if name != "dense"]  # which refuses to be


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_member_is_as_accurate_as_alone(
    backend: str, dtype: torch.dtype, dropout_p: float
) -> None:
    with qlk.backend(backend):
        for tokens in (1, 5, 70):
            check_members(CPU, problems(tokens, dtype, dropout_p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_x_is_the_members_sum(backend: str, dtype: torch.dtype) -> None:
    with qlk.backend(backend):
        for tokens, dropout_p in itertools.product((3, 70), (0.0, 0.3)):
            check_sums(CPU, problems(tokens, dtype, dropout_p))


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
    with qlk.backend(backend):
        for tokens in (0, 4):
            check_needs(CPU, problems(tokens, torch.float32))


@pytest.mark.parametrize("backend", INVARIANT)
def test_batch_invariant_rows(backend: str) -> None:
    with qlk.backend(backend):
        check_invariance(CPU, problems(33, torch.float32))


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
    with qlk.backend("reference"):
        expected = forward(members, x)
        with torch.autocast("cpu", torch.bfloat16):
            ys, xa = forward(members, x)
    for got, wanted in zip((*ys, xa), (*expected[0], expected[1]), strict=True):
        assert_bitwise_equal(got, wanted)


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
