"""qlora_group's CUDA entry without a GPU: what it launches, and that its GEMMs are put together
rightly (plain torch in place of the kernels; tests/emulation/cuda runs those)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlora_kernels.backends.cuda.dense_path import dense_backward
from qlora_kernels.backends.cuda.extension_path import (
    copy_cost,
    extends,
    extends_forward,
    padded_rank,
)
from qlora_kernels.backends.cuda.qlora_group import qlora_group_backward_cuda, qlora_group_cuda
from qlora_kernels.backends.cuda.qlora_linear import qlora_linear_cuda
from qlora_kernels.reference import dropout_reference
from qlora_kernels.reference.qlora_group import (
    GroupGradients,
    GroupMember,
    MemberNeeds,
    rank_ranges,
)
from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal
from tests.backends.cuda_on_cpu import install
from tests.problems import DTYPES, QLoRAProblem, random_qlora, random_weight
from tests.tolerances import (
    assert_matmul,
    assert_qlora,
    assert_qlora_backward,
    exact_weight,
    rounded_weight,
)

BF16 = torch.bfloat16
Layer = tuple[int, int, torch.dtype, float]  # N, R, the adapter's dtype, dropout_p


def problems(layers: list[Layer], tokens: int, cols: int, dtype: torch.dtype) -> list[QLoRAProblem]:
    """Layers of one x; every second one double-quantized, every third with a bias."""
    found: list[QLoRAProblem] = []
    for i, (rows, rank, adapter, dropout_p) in enumerate(layers):
        weight = random_weight((rows, cols), 64, ("absmax", "nested")[i % 2], seed=i)
        options = {"bias_dtype": None if i % 3 else dtype, "dropout_p": dropout_p, "seed": i + 1}
        p = random_qlora(tokens, weight, rank, dtype, adapter, **options)
        found.append(p.with_x(found[0].x) if found else p)
    return found


def as_members(found: list[QLoRAProblem]) -> list[GroupMember]:
    return [
        GroupMember(
            *(p.weight, *((p.lora_a, p.lora_b) if len(p.lora_a) else (None, None))),
            *(p.scaling, p.bias, p.dropout_p, p.seed),
        )
        for p in found
    ]


def all_needs(members: list[GroupMember]) -> MemberNeeds:
    wanted = [m.lora_a is not None for m in members]
    return MemberNeeds(True, wanted, wanted)


def _flat(gradients: GroupGradients) -> list[torch.Tensor]:
    grad_x, grads_a, grads_b = gradients
    return [grad_x, *grads_a, *grads_b]


def check(found: list[QLoRAProblem]) -> None:
    """Forward and backward, together and with one gradient at a time; twice, to the same bits."""
    members, x = as_members(found), found[0].x
    ys, xa = qlora_group_cuda(x, members)
    for again, first in zip(qlora_group_cuda(x, members)[0], ys, strict=True):
        assert_bitwise_equal(again, first)
    needs, grad_ys = all_needs(members), [p.grad_y for p in found]
    together = qlora_group_backward_cuda(grad_ys, x, xa, members, needs)
    again = qlora_group_backward_cuda(grad_ys, x, xa, members, needs)
    for one, other in zip(_flat(again), _flat(together), strict=True):
        assert_bitwise_equal(one, other)
    exact = torch.zeros(x.shape, dtype=torch.float64)
    torchs = torch.zeros_like(x)
    for i, (p, (begin, end)) in enumerate(zip(found, rank_ranges(members), strict=True)):
        assert ys[i].is_contiguous()
        assert len({y.untyped_storage().data_ptr() for y in ys}) == len(ys)
        single = [p.grad_y if j == i else None for j in range(len(found))]
        grad_x, grads_a, grads_b = qlora_group_backward_cuda(single, x, xa, members, needs)
        if members[i].lora_a is None:
            assert_matmul(ys[i], x, p.weight, p.bias)
        else:
            assert_qlora(ys[i], xa[:, begin:end], p)
            assert_qlora_backward((grad_x, grads_a[i], grads_b[i]), p)
            assert_qlora_backward((grad_x, together[1][i], together[2][i]), p)
        exact += alone(p, torch.float64)
        torchs += alone(p, x.dtype)
    assert_as_accurate(together[0], exact, torchs)


def alone(p: QLoRAProblem, dtype: torch.dtype) -> torch.Tensor:
    """A layer's grad_x by torch's own products in `dtype`."""
    grad_y = p.grad_y.to(dtype)
    exact = dtype == torch.float64
    weight = exact_weight(p.weight) if exact else rounded_weight(p.weight, dtype)
    u = (grad_y @ p.lora_b.to(dtype)) * p.scaling
    return grad_y @ weight + dropout_reference(u @ p.lora_a.to(dtype), p.dropout_p, p.seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [9, 150])
def test_a_group_computes_its_layers(
    dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    wide = torch.float32
    check(
        problems([(96, 16, wide, 0.0), (40, 5, dtype, 0.0), (64, 0, wide, 0.0)], tokens, 192, dtype)
    )
    check(
        problems([(96, 4, wide, 0.3), (40, 5, wide, 0.0), (33, 8, wide, 0.3)], tokens, 128, dtype)
    )
    # More rows than the copies of grad_y are worth: grad_x is summed in place.
    check(problems([(500, 8, wide, 0.0), (520, 8, wide, 0.0)], tokens, 64, dtype))
    # Fewer than the copy of x is worth, and rows that no vector divides.
    check(problems([(17, 3, wide, 0.0), (15, 3, wide, 0.0)], tokens, 200, dtype))


def test_what_a_group_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    layers: list[Layer] = [(256, 16, torch.float32, 0.0)] * 3
    found = problems(layers, 150, 512, BF16)
    members, x = as_members(found), found[0].x
    _, xa = qlora_group_cuda(x, members)
    assert calls == {"dequantize_many": 1, "column_product": 1}
    calls.clear()
    gemms = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: gemms.append((a.shape, b.shape)) or matmul(a, b)
    )
    grad_ys = [p.grad_y for p in found]
    qlora_group_backward_cuda(grad_ys, x, xa, members, all_needs(members))
    assert calls == {"dequantize_many": 1, "adapter_gradients": 3, "token_product": 1}
    depth = 3 * (256 + 16)
    assert ((150, depth), (depth, 512)) in gemms
    calls.clear()
    qlora_group_cuda(x[:8], members)
    assert calls == {"down_projection": 1, "fused_matmul": 3}


def test_gradients_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    found = problems([(96, 4, BF16, 0.0), (40, 0, BF16, 0.0), (64, 8, BF16, 0.0)], 140, 128, BF16)
    members, x = as_members(found), found[0].x
    _, xa = qlora_group_cuda(x, members)
    calls.clear()
    grad_ys = [found[0].grad_y, None, found[2].grad_y]
    needs = MemberNeeds(False, [True, False, False], [False, False, True])
    grad_x, grads_a, grads_b = qlora_group_backward_cuda(grad_ys, x, xa, members, needs)
    assert not calls["dequantize_many"] and not calls["dequantize"] and not grad_x.numel()
    assert [g.numel() for g in grads_a] == [4 * 128, 0, 0]
    assert [g.numel() for g in grads_b] == [0, 0, 64 * 8]
    # Outputs that were not used: gradients of zeros where they are wanted.
    unused = qlora_group_backward_cuda([None] * 3, x, xa, members, all_needs(members))
    assert not any(g.any() for g in (unused[0], *unused[1], *unused[2]))
    assert unused[0].shape == x.shape and unused[2][2].shape == (64, 8)


def test_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    for dtype in DTYPES:
        found = problems([(96, 4, torch.float32, 0.0), (40, 3, torch.float32, 0.5)], 0, 128, dtype)
        members = as_members(found)
        ys, xa = qlora_group_cuda(found[0].x, members)
        assert [y.shape for y in ys] == [(0, 96), (0, 40)] and xa.shape == (0, 7)
        grads = dense_backward(
            [p.grad_y for p in found], found[0].x, xa, members, all_needs(members)
        )
        assert grads[0].shape == (0, 128)
        assert not any(g.any() for g in (*grads[1], *grads[2]))


def test_nan_of_a_token_stays_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    # fp32: torch's bf16 products on AMX let a NaN reach the next row.
    found = problems([(96, 4, torch.float32, 0.0), (40, 3, BF16, 0.0)], 140, 128, torch.float32)
    members, x = as_members(found), found[0].x.clone()
    clean, _ = qlora_group_cuda(x, members)
    x[3, 5] = float("nan")
    ys, _ = qlora_group_cuda(x, members)
    for y, before in zip(ys, clean, strict=True):
        assert y[3].isnan().all()
        assert_bitwise_equal(torch.cat([y[:3], y[4:]]), torch.cat([before[:3], before[4:]]))


def test_extension_follows_from_what_it_moves() -> None:
    # q, k, v and gate, up take the copy of x; down_proj of a Llama does not.
    assert extends_forward(4096, 4096, one_pass=True)
    assert extends_forward(2 * 14_336, 4096, one_pass=False)
    assert not extends_forward(4096, 14_336, one_pass=True)
    assert not extends_forward(2048, 4096, one_pass=True)
    assert extends_forward(4096, 4096 + 64, one_pass=True)
    assert not extends_forward(4096, 4096 + 64, one_pass=False)
    # grad_x: a layer alone takes the copy of grad_y where N < 2K.
    assert extends(copy_cost(4096, True), 2, 4096)
    assert not extends(copy_cost(14_336, True), 2, 4096)
    # Three members and their adapters are four products, q, k and v 3 * 4096 columns.
    assert extends(3 * copy_cost(4096, True), 4, 4096)
    assert not extends(2 * copy_cost(14_336, True), 3, 4096)
    assert not extends(copy_cost(8, True), 1, 10**9)
    assert [padded_rank(r) for r in (0, 1, 8, 9, 64)] == [0, 8, 8, 16, 64]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_down_projection_adds_its_adapter(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N below K / 2: nothing is copied."""
    calls = install(monkeypatch)
    shapes = []
    linear = F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, w, bias=None: shapes.append(w.shape) or linear(x, w, bias)
    )
    for p in problems([(64, 8, torch.float32, 0.0), (64, 8, torch.float32, 0.2)], 150, 256, dtype):
        y, xa = qlora_linear_cuda(
            *(p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, p.dropout_p, p.seed)
        )
        assert shapes[-1] == (64, 256) and not calls["column_product"]
        assert_qlora(y, xa, p)
