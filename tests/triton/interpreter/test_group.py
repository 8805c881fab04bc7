"""qlora_group: each member as accurate as alone, whichever path it takes, and x read once."""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora_kernels.backends.triton import low_rank, qlora_group
from qlora_kernels.backends.triton.launch import Launch
from qlora_kernels.backends.triton.qlora_group import (
    qlora_group_backward_triton,
    qlora_group_triton,
)
from qlora_kernels.reference.qlora_group import GroupMember, MemberNeeds
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.problems import QLoRAProblem, random_qlora, random_weight
from tests.tolerances import (
    assert_matmul,
    assert_matmul_backward,
    assert_qlora,
    assert_qlora_backward,
)
from tests.triton.checks import MANY_TOKENS, many_tokens_are_few, problem_on

BF16 = torch.bfloat16
CPU = torch.device("cpu")
# N and R of each member; R = 0: no adapter.
SIZES = ((70, 4), (16, 0), (33, 9), (48, 16))


def problems(
    tokens: int,
    cols: int,
    dtype: torch.dtype = BF16,
    dropouts: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
    scalings: tuple[float, ...] = (1.75, 1.75, 1.75, 1.75),
    adapters: tuple[torch.dtype, ...] = (torch.float32,) * 4,
) -> list[QLoRAProblem]:
    """Members with one x [tokens, cols], on the CPU."""
    made = [
        random_qlora(
            tokens,
            random_weight((rows, cols), 32, ("nested", "absmax")[i % 2], seed=i),
            rank,
            dtype,
            adapters[i],
            bias_dtype=(torch.float32, None)[i % 2],
            dropout_p=dropouts[i] if rank else 0.0,
            scaling=scalings[i],
            seed=i,
        )
        for i, (rows, rank) in enumerate(SIZES)
    ]
    return [p.with_x(made[0].x) for p in made]


def member(p: QLoRAProblem) -> GroupMember:
    adapter = (p.lora_a, p.lora_b) if len(p.lora_a) else (None, None)
    return GroupMember(p.weight, *adapter, p.scaling, p.bias, p.dropout_p, p.seed)


ALL = MemberNeeds(True, [True] * 4, [True] * 4)


def check_group(device: torch.device, group: list[QLoRAProblem], invariant: bool = False) -> None:
    """Forward, and the gradients of each member alone and of all."""
    there = [problem_on(device, p) for p in group]
    members, x = [member(p) for p in there], there[0].x
    ys, xa = qlora_group_triton(x, members, invariant)
    parts = xa.split([m.rank for m in members], dim=1)
    for p, y, part in zip(group, ys, parts, strict=True):
        if len(p.lora_a):
            assert_qlora(y.cpu(), part.cpu(), p)
        else:
            assert_matmul(y.cpu(), p.x, p.weight, p.bias)
    grads = [p.grad_y for p in there]
    whole = qlora_group_backward_triton(grads, x, xa, members, ALL)
    total = torch.zeros(group[0].x.shape, dtype=torch.float64)
    largest = 0.0
    for i, p in enumerate(group):
        only = [grad if j == i else None for j, grad in enumerate(grads)]
        grad_x, grads_a, grads_b = qlora_group_backward_triton(only, x, xa, members, ALL)
        if len(p.lora_a):
            assert_qlora_backward((grad_x.cpu(), grads_a[i].cpu(), grads_b[i].cpu()), p)
            # Computed with the others they are as accurate.
            assert_qlora_backward((grad_x.cpu(), whole[1][i].cpu(), whole[2][i].cpu()), p)
        else:
            assert_matmul_backward(grad_x.cpu(), p.grad_y, p.weight)
        total += grad_x.cpu().double()
        largest = max(largest, float(grad_x.double().abs().max()))
    # Every part, and every sum of parts, is rounded once.
    error = (whole[0].cpu().double() - total).abs().max()
    assert error <= 8 * largest * torch.finfo(x.dtype).eps
    assert error < 0.05 * total.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_group_of_few_tokens(device: torch.device, dtype: torch.dtype, dropout: float) -> None:
    for tokens, cols in ((1, 96), (5, 131), (40, 96)):
        check_group(device, problems(tokens, cols, dtype, (dropout, 0.0, 0.0, dropout)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropouts": (0.3, 0.0, 0.0, 0.0)},
        {"dropouts": (1.0, 0.0, 0.0, 0.0)},
        {"scalings": (1.75, 1.0, 0.5, 1.75)},
        {"adapters": (BF16, BF16, torch.float32, BF16)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@many_tokens_are_few()
def test_group_of_many_tokens(device: torch.device, options: dict[str, tuple]) -> None:
    check_group(device, problems(MANY_TOKENS, 96, BF16, **options))


@many_tokens_are_few()
def test_ragged_rows_of_many_tokens(device: torch.device) -> None:
    check_group(device, problems(MANY_TOKENS, 131, torch.float16))


def test_group_batch_invariant(device: torch.device) -> None:
    group = problems(70, 96)
    check_group(device, group, invariant=True)
    there = [problem_on(device, p) for p in group]
    members, x = [member(p) for p in there], there[0].x
    ys, xa = qlora_group_triton(x, members, True)
    for begin, end in ((0, 1), (64, 70)):
        part_ys, part_xa = qlora_group_triton(x[begin:end].clone(), members, True)
        for got, whole in zip((*part_ys, part_xa), (*ys, xa), strict=True):
            assert_bitwise_equal(got, whole[begin:end])


@many_tokens_are_few()
def test_group_of_nothing_and_needs(device: torch.device) -> None:
    for tokens in (0, 6, MANY_TOKENS):
        there = [problem_on(device, p) for p in problems(tokens, 96)]
        members, x = [member(p) for p in there], there[0].x
        ys, xa = qlora_group_triton(x, members)
        assert [y.shape for y in ys] == [(tokens, rows) for rows, _ in SIZES]
        assert xa.shape == (tokens, 29)
        grads = [p.grad_y for p in there]
        whole = qlora_group_backward_triton(grads, x, xa, members, ALL)
        none = qlora_group_backward_triton([None] * 4, x, xa, members, ALL)
        assert none[0].shape == x.shape and not none[0].any()
        assert not any(grad.any() for grad in (*none[1], *none[2]))
        flags = list(itertools.product([False, True], repeat=3))
        for needs_x, a, b in flags if tokens < MANY_TOKENS else flags[1:7:4]:
            needs = MemberNeeds(needs_x, [a, False, b, a], [b, False, a, a])
            got = qlora_group_backward_triton(grads, x, xa, members, needs)
            assert_bitwise_equal(got[0], whole[0] if needs_x else x.new_empty(0))
            for wanted, mine, full in zip(needs[1:], got[1:], whole[1:], strict=True):
                for needed, one, other in zip(wanted, mine, full, strict=True):
                    close = other if needed else other.new_empty(0)
                    # With other adapters beside it a gradient's sums are split in the same way.
                    torch.testing.assert_close(one, close, rtol=1e-5, atol=1e-5)


@many_tokens_are_few()
def test_two_runs_agree_in_every_bit(device: torch.device) -> None:
    for tokens in (6, MANY_TOKENS):
        there = [problem_on(device, p) for p in problems(tokens, 96)]
        members, x, grads = [member(p) for p in there], there[0].x, [p.grad_y for p in there]
        runs = []
        for _ in range(2):
            ys, xa = qlora_group_triton(x, members)
            grad_x, grads_a, grads_b = qlora_group_backward_triton(grads, x, xa, members, ALL)
            runs.append((*ys, xa, grad_x, *grads_a, *grads_b))
        for one, two in zip(*runs, strict=True):
            assert_bitwise_equal(two, one)


@pytest.mark.parametrize("tokens", [6, MANY_TOKENS])
@many_tokens_are_few()
def test_x_is_read_once_each_way(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    names: list[str] = []
    real = Launch.run

    def counting(launch: Launch) -> None:
        names.append(launch.kernel.rpartition(".")[2])
        real(launch)

    monkeypatch.setattr(Launch, "run", counting)
    assert low_rank.run_all is qlora_group.run_all
    there = [problem_on(device, p) for p in problems(tokens, 96)]
    members, x, grads = [member(p) for p in there], there[0].x, [p.grad_y for p in there]
    ys, xa = qlora_group_triton(x, members)
    assert len(ys) == 4 and names.count("_down_kernel") == 1
    names.clear()
    qlora_group_backward_triton(grads, x, xa, members, ALL)
    assert names.count("_down_gradient_kernel") == 1
    assert names.count("_up_gradients_kernel") == 3
    if tokens == MANY_TOKENS:
        # One scratch with all weights: two stores, each in one launch.
        assert names.count("_dequantize_many_kernel") == 2
    else:
        assert names.count("_fused_backward_kernel") == 4
