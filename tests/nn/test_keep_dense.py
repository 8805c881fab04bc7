"""keep_dense_weights: what a forward dequantizes serves its backward, and lives no longer. The CUDA
entries run on CPU tensors, with plain torch in place of the kernels."""

from __future__ import annotations

import types
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qlora_kernels as qlk
from qlora_kernels.backends import kept
from qlora_kernels.backends.cuda import qlora_group, qlora_linear, quantized_matmul
from qlora_kernels.backends.registry import Problem
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.backends.cuda_on_cpu import install
from tests.nn.groups import attention
from tests.tolerances import assert_matmul_backward

K = 64
KERNELS = {
    "quantized_matmul": quantized_matmul.quantized_matmul_cuda,
    "quantized_matmul_backward_input": quantized_matmul.quantized_matmul_backward_input_cuda,
    "qlora_linear": qlora_linear.qlora_linear_cuda,
    "qlora_linear_backward": qlora_linear.qlora_linear_backward_cuda,
    "qlora_group": qlora_group.qlora_group_cuda,
    "qlora_group_backward": qlora_group.qlora_group_backward_cuda,
}


class Launches(Counter[str]):
    """Launches by name, and the dense weights that forwards left."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[weakref.ref[Tensor]] = []

    @property
    def decoded(self) -> int:
        return self["dequantize"] + self["dequantize_many"]

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.left)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Every op runs its CUDA entry."""
    found, counted = Launches(), install(monkeypatch)
    monkeypatch.setattr(Launches, "__getitem__", lambda self, name: counted[name])
    monkeypatch.setattr(Launches, "clear", lambda self: (counted.clear(), self.left.clear()))

    def select(problem: Problem) -> Any:
        return types.SimpleNamespace(fn=KERNELS[problem.op])

    for op in ("quantized_matmul", "qlora_linear", "qlora_group"):
        monkeypatch.setattr(f"qlora_kernels.ops.{op}.select", select)
    leave = kept.leave

    def leaving(weight: Tensor) -> None:
        found.left.append(weakref.ref(weight))
        leave(weight)

    monkeypatch.setattr(kept, "leave", leaving)
    return found


def stack(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    adapter = {"rank": 4, "alpha": 8, "dropout": dropout}
    layers = nn.Sequential(
        qlk.QLoRALinear.from_linear(nn.Linear(K, 96), **adapter),
        qlk.QuantizedLinear.from_linear(nn.Linear(96, 40, bias=False)),
        qlk.QLoRALinear.from_linear(nn.Linear(40, K), **adapter),
    )
    with torch.no_grad():
        for parameter in qlk.lora_parameters(layers):
            parameter.normal_(std=0.3)
    return layers


def x_of(tokens: int = 150) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, K, generator=generator).requires_grad_()


def gradients(model: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    torch.manual_seed(11)
    ys = call(x)
    total = sum((y * y).sum() for y in (ys if isinstance(ys, tuple) else (ys,)))
    return list(torch.autograd.grad(total, [x, *qlk.lora_parameters(model)]))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_decodes_for_its_backward(
    use_reentrant: bool, dropout: float, launches: Launches
) -> None:
    model, x = stack(dropout), x_of()

    def step() -> list[Tensor]:
        torch.manual_seed(11)
        x.grad = None
        for parameter in qlk.lora_parameters(model):
            parameter.grad = None
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        assert not launches.alive, "kept after the first forward"
        y.square().sum().backward()
        return [p.grad for p in (x, *qlk.lora_parameters(model))]

    wanted = step()
    assert launches.decoded == 9 and not launches.left
    launches.clear()
    assert qlk.keep_dense_weights(model) == 3
    for got, right in zip(step(), wanted, strict=True):
        assert_bitwise_equal(got, right)
    assert launches.decoded == 6 and not launches.alive
    assert len(launches.left) == (3 if use_reentrant else 6)
    qlk.keep_dense_weights(model, False)
    launches.clear()
    step()
    assert launches.decoded == 9 and not launches.left


def test_without_checkpointing_it_lives_until_backward(launches: Launches) -> None:
    model, x = stack(), x_of()
    wanted = gradients(model, model, x)
    qlk.keep_dense_weights(model)
    launches.clear()
    y = model(x)
    assert launches.alive == 3
    parameters = [x, *qlk.lora_parameters(model)]
    first = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), parameters)
    assert launches.decoded == 3 and not launches.alive
    for got, other, right in zip(first, again, wanted, strict=True):
        assert_bitwise_equal(got, right)
        assert_bitwise_equal(other, right)


def test_a_group_keeps_one_scratch(launches: Launches) -> None:
    for dropout in (0.0, 0.4):
        model = attention(dropout).to(torch.bfloat16)
        x = torch.randn(3, 60, K, dtype=torch.bfloat16, requires_grad=True)
        qlk.group_projections(model)
        launches.clear()
        wanted = gradients(model, model, x)
        assert launches.decoded == 2
        qlk.keep_dense_weights(model)
        for call in (model, model.q_proj.group):
            launches.clear()
            for got, right in zip(gradients(model, call, x), wanted, strict=True):
                assert_bitwise_equal(got, right)
            assert launches.decoded == 1 and len(launches.left) == 1 and not launches.alive
        # One of its outputs alone: the scratch has the rows of all of them.
        weight = model.k_proj.quantized_weight.operands()
        for keep in (True, False):
            qlk.keep_dense_weights(model, keep)
            torch.manual_seed(2)
            y = model.q_proj.group(x)[1]
            grad_x = torch.autograd.grad(y, x, torch.ones_like(y))[0]
            ones = y.new_ones(x.shape[0] * x.shape[1], y.shape[-1])
            assert_matmul_backward(grad_x.reshape(-1, K), ones, weight)


def test_a_weight_that_changed_is_not_used(launches: Launches) -> None:
    """The codes are saved beside it: torch refuses a backward over what was changed since."""
    model, x = stack(), x_of()
    qlk.keep_dense_weights(model)
    y = model(x)
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_kept_where_nothing_needs_it(launches: Launches) -> None:
    model = stack()
    qlk.keep_dense_weights(model)
    model(x_of().detach())[0].sum().backward()
    assert len(launches.left) == 2, "the first layer's x has no gradient"
    with torch.no_grad():
        model(x_of())
    launches.clear()
    few = torch.randn(9, K, dtype=torch.bfloat16, requires_grad=True)
    model[0](few).sum().backward()
    assert launches["fused_matmul"] == 1 and not launches.left
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x_of()).sum().backward()
    assert not launches.left


def test_a_dense_weight_of_other_rows_or_dtype_is_refused() -> None:
    weight = torch.zeros(4, 2)

    def look() -> list[bool]:
        others = ((4, weight), (3, weight), (4, weight.half()))
        return [kept.given(rows, like) is not None for rows, like in others]

    assert kept.run_backward(look, weight) == [True, False, False]
    assert look() == [False] * 3
