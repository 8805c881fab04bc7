"""What qlora_group, QLoRAGroup and dequantize_many must do, on any device: tests/ops and tests/nn
run these checks on every backend of the CPU, tests/gpu on CUDA tensors. The caller forces the
backend."""

from __future__ import annotations

import torch

import qlora_kernels as qlk
from qlora_kernels.ops.qlora_group import member_fields
from qlora_kernels.reference.qlora_group import GroupMember, MemberNeeds
from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal
from tests.nn.groups import Attention, step, tokens
from tests.problems import DTYPES, QLoRAProblem, problem_on, random_qlora, random_weight
from tests.tolerances import (
    assert_adapter_gradients,
    assert_grad_x,
    assert_matmul,
    assert_matmul_backward,
    assert_qlora,
    assert_qlora_backward,
)

ops = torch.ops.qlora_kernels
CPU = torch.device("cpu")
# N and R of each member; R = 0: no adapter.
SIZES = ((40, 4), (17, 0), (65, 9))
ALL = MemberNeeds(True, [True] * 3, [True] * 3)


def problems(
    tokens: int,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    cols: int = 96,
    block_size: int = 32,
) -> list[QLoRAProblem]:
    """Members with one x [tokens, cols], on the CPU."""
    made = [
        random_qlora(
            tokens,
            random_weight((rows, cols), block_size, ("absmax", "nested")[i % 2], seed=i),
            rank,
            dtype,
            torch.float32,
            bias_dtype=(torch.float32, None)[i % 2],
            dropout_p=dropout_p if i != 1 else 0.0,
            seed=i,
        )
        for i, (rows, rank) in enumerate(SIZES)
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


def check_members(device: torch.device, group: list[QLoRAProblem]) -> None:
    """Each member is as accurate as alone, and gets no gradient of another's output."""
    there = [problem_on(device, p) for p in group]
    members, x = [member(p) for p in there], there[0].x
    ys, xa = forward(members, x)
    parts = xa.split([m.rank for m in members], dim=1)
    for i, p in enumerate(group):
        # Of one member alone, so that its share of grad_x can be told.
        grads = [q.grad_y if j == i else None for j, q in enumerate(there)]
        grad_x, grads_a, grads_b = backward(members, x, xa, grads, ALL)
        if members[i].rank:
            assert_qlora(ys[i].cpu(), parts[i].cpu(), p)
            assert_qlora_backward((grad_x.cpu(), grads_a[i].cpu(), grads_b[i].cpu()), p)
        else:
            assert_matmul(ys[i].cpu(), p.x, p.weight, p.bias)
            assert_matmul_backward(grad_x.cpu(), p.grad_y, p.weight)
        for j, m in enumerate(members):
            if j != i and m.lora_a is not None:
                assert not grads_a[j].any() and not grads_b[j].any()


def check_sums(device: torch.device, group: list[QLoRAProblem]) -> None:
    """grad_x of all members is the sum of theirs; their adapters' gradients are those of each."""
    there = [problem_on(device, p) for p in group]
    members, x = [member(p) for p in there], there[0].x
    grads = [p.grad_y for p in there]
    _, xa = forward(members, x)
    grad_x, grads_a, grads_b = backward(members, x, xa, grads, ALL)
    assert_grad_x(grad_x.cpu(), group)
    for i, p in enumerate(group):
        if members[i].rank:
            assert_adapter_gradients(grads_a[i].cpu(), grads_b[i].cpu(), p)


def check_needs(device: torch.device, group: list[QLoRAProblem]) -> None:
    """Gradients that are not needed are empty; no output used: zeros; no tokens: empty results."""
    there = [problem_on(device, p) for p in group]
    members, x, grads = [member(p) for p in there], there[0].x, [p.grad_y for p in there]
    ys, xa = forward(members, x)
    assert [y.shape for y in ys] == [(len(x), rows) for rows, _ in SIZES]
    grad_x, grads_a, grads_b = backward(
        members, x, xa, grads, MemberNeeds(False, [True, False, False], [False, False, True])
    )
    assert grad_x.numel() == 0
    assert [g.numel() for g in grads_a] == [len(group[0].lora_a) * x.shape[1], 0, 0]
    assert [g.numel() for g in grads_b] == [0, 0, group[2].lora_b.numel()]
    of_x, of_a, of_b = backward(members, x, xa, [None] * 3 if len(x) else grads, ALL)
    assert of_x.shape == x.shape
    assert not any(g.any() for g in (of_x, *of_a, *of_b))


def check_invariance(device: torch.device, group: list[QLoRAProblem]) -> None:
    """With batch_invariant a token's bits are the same alone."""
    there = [problem_on(device, p) for p in group]
    members, x = [member(p) for p in there], there[0].x
    ys, xa = forward(members, x, True)
    for begin, end in ((0, 1), (len(x) - 3, len(x))):
        part_ys, part_xa = forward(members, x[begin:end].clone(), True)
        for got, whole in zip((*part_ys, part_xa), (*ys, xa), strict=True):
            assert_bitwise_equal(got, whole[begin:end])


def check_grouped_model(
    device: torch.device, model: Attention, dtype: torch.dtype, tokens_each: int
) -> list[torch.Tensor]:
    """A training step of a grouped model is as accurate as one of its layers apart, dropout of the
    same seeds included. Returns the grouped one's outputs and gradients."""
    model, x = model.to(device), tokens(dtype, tokens_each).to(device)
    with qlk.backend("reference"):
        exact = step(model, model, x.double())
        torchs = step(model, model, x)
    qlk.group_projections(model)
    together = step(model, model, x)
    explicit = step(model.q_proj.group, model, x)
    qlk.ungroup_projections(model)
    assert_bitwise_equal(together.pop(), exact.pop(), "the generator's state")
    for i, got in enumerate(together):
        assert_bitwise_equal(explicit[i], got)
        assert_as_accurate(got, exact[i], torchs[i])
    return together


def mixed_weights(repeats: int = 1) -> list[qlk.QuantizedWeight]:
    """On the CPU: formats that kernels take as they are stored and others, single and double
    quantization, ragged, of odd length, empty, of 3 and 1-D; with three repeats more than one
    launch takes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 64), (7, 9), (0, 64), (5, 4097), (2, 3, 5), (65,), (8, 128)) * repeats
    made = [
        qlk.quantize(
            torch.randn(shape, generator=generator).to(DTYPES[i % 3]),
            ("nf4", "fp4", "int4")[i % 3],
            (32, 64, 128)[i % 3],
            i % 2 == 0,
        )
        for i, shape in enumerate(shapes)
    ]
    composed = [name for name in qlk.list_formats() if not qlk.get_format(name).plain]
    return made + [
        qlk.quantize(torch.randn(8, 64, generator=generator), name) for name in composed[:3]
    ]


def check_dequantize_many(
    device: torch.device,
    weights: list[qlk.QuantizedWeight],
    dtype: torch.dtype | None,
) -> None:
    """Each of the weights is what dequantize gives on the CPU by the reference, into new tensors
    and into given ones of any layout."""
    with qlk.backend("reference"):
        expected = [qlk.dequantize(qw, dtype) for qw in weights]
    there = [qw.to(device) for qw in weights]
    outs = [_out(i, wanted.to(device)) for i, wanted in enumerate(expected)]
    dense = qlk.dequantize_many(there, dtype)
    written = qlk.dequantize_many(there, dtype, outs)
    for fresh, given, out, wanted in zip(dense, written, outs, expected, strict=True):
        assert_bitwise_equal(fresh.cpu(), wanted)
        assert_bitwise_equal(given.cpu(), wanted)
        assert out is None or given is out
        if out is not None and out.dim() == 2 and out.stride(0) > out.shape[1] > 1:
            gap = out.as_strided((len(out), out.stride(0)), out.stride())[:-1, out.shape[1] :]
            assert (gap == 7.0).all()


def _out(number: int, like: torch.Tensor) -> torch.Tensor | None:
    """A given tensor: contiguous, none, with a gap after each row, or transposed."""
    if number % 4 == 1 or like.dim() == 3:
        return None
    if like.dim() == 1:
        return like.new_empty(2 * len(like))[::2]
    rows, cols = like.shape
    if number % 4 == 2:
        return like.new_full((rows, cols + 3), 7.0)[:, :cols]
    return like.new_empty(cols, rows).t() if number % 4 == 3 else like.new_empty(rows, cols)
