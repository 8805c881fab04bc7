"""The written spec of qlora_linear: fp64 maths and torch's autograd, rounding order, dropout."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from qlora_kernels.formats import list_formats
from qlora_kernels.reference import (
    dequantize_reference,
    dropout_reference,
    qlora_linear_backward_reference,
    qlora_linear_reference,
)
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.shapes import RAGGED_WEIGHTS
from tests.problems import DTYPES, QLoRAProblem, random_qlora, random_weight
from tests.tolerances import assert_qlora

FP64 = {"rtol": 1e-12, "atol": 1e-12}
ALL = (True, True, True)


def forward(p: QLoRAProblem, invariant: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return qlora_linear_reference(
        p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, p.dropout_p, p.seed, invariant
    )


def backward(
    p: QLoRAProblem, xa: torch.Tensor, needs: tuple[bool, bool, bool] = ALL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return qlora_linear_backward_reference(
        p.grad_y, p.x, xa, p.weight, p.lora_a, p.lora_b, p.scaling, p.dropout_p, p.seed, needs
    )


def dense(p: QLoRAProblem) -> torch.Tensor:
    """y by torch, differentiable, the dropout mask as a factor."""
    factor = dropout_reference(torch.ones_like(p.x), p.dropout_p, p.seed)
    weight = dequantize_reference(p.weight, p.weight.shape, p.x.dtype)
    return F.linear(p.x, weight, p.bias) + p.scaling * F.linear(
        F.linear(p.x * factor, p.lora_a), p.lora_b
    )


@pytest.mark.parametrize("name", list_formats())
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_forward_and_backward_are_plain_fp64_maths(name: str, dropout_p: float) -> None:
    for seed, shape in enumerate(RAGGED_WEIGHTS):
        p = random_qlora(
            6,
            random_weight(shape, 32, "nested", name, seed),
            rank=1 + seed,
            dtype=torch.float64,
            bias_dtype=torch.float64,
            dropout_p=dropout_p,
            seed=seed,
        )
        for tensor in (p.x, p.lora_a, p.lora_b):
            tensor.requires_grad_()
        expected = dense(p)
        inputs = (p.x, p.lora_a, p.lora_b)
        expected_grads = torch.autograd.grad(expected, inputs, p.grad_y)
        with torch.no_grad():
            y, xa = forward(p)
            grads = backward(p, xa)
        torch.testing.assert_close(y, expected.detach(), **FP64)
        for got, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, wanted, **FP64)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backward_is_the_derivative_of_forward(dropout_p: float) -> None:
    p = random_qlora(
        3, random_weight((7, 33), 32), 2, torch.float64, dropout_p=dropout_p, scaling=0.7
    )

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            y, xa = qlora_linear_reference(x, p.weight, a, b, p.scaling, None, p.dropout_p, p.seed)
            ctx.save_for_backward(x, xa, a, b)
            return y

        @staticmethod
        def backward(ctx, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, xa, a, b = ctx.saved_tensors
            return qlora_linear_backward_reference(
                grad_y, x, xa, p.weight, a, b, p.scaling, p.dropout_p, p.seed
            )

    inputs = tuple(t.requires_grad_() for t in (p.x, p.lora_a, p.lora_b))
    assert torch.autograd.gradcheck(Linear.apply, inputs)


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_dtypes_of_what_they_belong_to(
    dtype: torch.dtype, adapter: torch.dtype
) -> None:
    p = random_qlora(4, random_weight((6, 40)), 3, dtype, adapter, bias_dtype=torch.float32)
    y, xa = forward(p)
    grad_x, grad_a, grad_b = backward(p, xa)
    assert y.dtype == xa.dtype == grad_x.dtype == dtype
    assert grad_a.dtype == grad_b.dtype == adapter


def by_hand(p: QLoRAProblem) -> tuple[torch.Tensor, ...]:
    """The rounding order of the module's docstring, from fp64 products rounded where it says."""

    def fp32(value: torch.Tensor) -> torch.Tensor:
        return value.float().double()

    def narrow(value: torch.Tensor) -> torch.Tensor:
        return value.float().to(p.x.dtype).double()

    weight = dequantize_reference(p.weight, p.weight.shape, p.x.dtype).double()
    a, b = narrow(p.lora_a), narrow(p.lora_b)
    x, g = p.x.double(), p.grad_y.double()
    xa = narrow(x @ a.T)
    y = narrow(fp32(x @ weight.T) + p.scaling * fp32(xa @ b.T))
    u = narrow(p.scaling * fp32(g @ b))
    grad_x = narrow(fp32(g @ weight) + fp32(u @ a))
    return y, xa, grad_x, fp32(u.T @ x), fp32(p.scaling * fp32(g.T @ xa))


def test_rounding_order() -> None:
    # Small whole numbers times powers of two: every fp32 sum is exact, so only the stated
    # roundings to bf16 are left, and they can be redone one by one.
    weight = random_weight((12, 20), 32)._replace(
        absmax=torch.full((8,), 0.5), codebook=torch.arange(-8.0, 8.0) + 2.0**-7
    )
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-9, 10, shape, generator=generator).float()

    # Halves and eighths beyond bf16's 8 bits: A and B change when they are rounded.
    a, b = whole(3, 20) * 37 + 0.125, whole(12, 3) * 41 + 0.125
    p = QLoRAProblem(
        whole(5, 20).bfloat16(), weight, a, b, 0.5, None, 0.0, None, whole(5, 12).bfloat16()
    )
    assert (a.bfloat16() != a).any() and (b.bfloat16() != b).any()
    y, xa = forward(p)
    grad_x, grad_a, grad_b = backward(p, xa)
    expected = by_hand(p)
    for got, wanted in zip((y, xa, grad_x, grad_a, grad_b), expected, strict=True):
        assert_bitwise_equal(got, wanted.to(got.dtype))
    assert grad_a.dtype == torch.float32 and (grad_a.bfloat16() != grad_a).any()


def test_dropout_reaches_the_adapter_alone_and_is_replayed() -> None:
    weight = random_weight((33, 129), 32)
    p = random_qlora(9, weight, 4, torch.float64, dropout_p=0.5, seed=3)
    masked = p.with_x(dropout_reference(p.x, 0.5, p.seed))
    without = random_qlora(9, weight, 4, torch.float64, seed=3)
    y, xa = forward(p)
    assert_bitwise_equal(xa, forward(without.with_x(masked.x))[1])
    base = forward(without)[0] - p.scaling * (forward(without)[1] @ p.lora_b.T)
    torch.testing.assert_close(y - p.scaling * (xa @ p.lora_b.T), base, **FP64)
    grad_x, grad_a, _ = backward(p, xa)
    u = p.scaling * (p.grad_y @ p.lora_b)
    torch.testing.assert_close(grad_a, u.T @ masked.x, **FP64)
    dropped = masked.x == 0
    through_base = p.grad_y @ dequantize_reference(weight, weight.shape, torch.float64)
    torch.testing.assert_close(grad_x[dropped], through_base[dropped], **FP64)
    assert ((grad_x - through_base)[~dropped].abs() > 1e-3).float().mean() > 0.95


def test_needs_leaves_out_what_is_not_asked_for() -> None:
    p = random_qlora(4, random_weight((6, 40)), 3, torch.float32)
    _, xa = forward(p)
    everything = backward(p, xa)
    for needs in itertools.product([False, True], repeat=3):
        for needed, got, wanted in zip(needs, backward(p, xa, needs), everything, strict=True):
            assert_bitwise_equal(got, wanted if needed else wanted.new_empty(0))


def test_batch_invariant_rows_do_not_depend_on_the_others() -> None:
    p = random_qlora(19, random_weight((65, 257), 32), 5, torch.float32, bias_dtype=torch.float32)
    y, xa = forward(p, invariant=True)
    for t in range(19):
        alone = forward(p.with_x(p.x[t : t + 1]), invariant=True)
        assert_bitwise_equal(y[t : t + 1], alone[0])
        assert_bitwise_equal(xa[t : t + 1], alone[1])
    assert_qlora(y, xa, p)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(
    ("tokens", "shape", "rank"),
    [(0, (5, 64), 2), (3, (0, 64), 2), (3, (5, 0), 2), (3, (5, 64), 0)],
    ids=["M0", "N0", "K0", "R0"],
)
def test_empty_operands(tokens: int, shape: tuple[int, int], rank: int, invariant: bool) -> None:
    p = random_qlora(tokens, random_weight(shape), rank, torch.float64, bias_dtype=torch.float64)
    y, xa = forward(p, invariant)
    assert y.shape == (tokens, shape[0]) and xa.shape == (tokens, rank)
    torch.testing.assert_close(y, dense(p), **FP64)
    grads = backward(p, xa)
    for got, like in zip(grads, (p.x, p.lora_a, p.lora_b), strict=True):
        assert got.shape == like.shape and not got.isnan().any()
