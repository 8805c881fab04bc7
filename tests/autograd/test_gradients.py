"""Gradients: right, economical in what they save, and unimpressed by checkpointing and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qlora_kernels as qlk
from qlora_kernels.autograd.lora_linear import LoRALinearFunction, lora_linear
from qlora_kernels.autograd.qlora_linear import QLoRALinearFunction
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.tolerances import assert_right, assert_slope

SIZES = [(5, 33, 65, 4), (40, 64, 128, 8), (3, 96, 64, 1)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, adapter: torch.dtype | None = None
) -> tuple[Tensor, qlk.QuantizedWeight, Tensor, Tensor, Tensor]:
    """x, weight, lora_a, lora_b, bias; all but the weight want gradients."""
    tokens, rows, cols, rank = sizes
    torch.manual_seed(0)
    qw = qlk.quantize(torch.randn(rows, cols) / cols**0.5)
    x = torch.randn(tokens, cols).to(dtype).requires_grad_()
    lora_a = (torch.randn(rank, cols) / cols**0.5).to(adapter or dtype).requires_grad_()
    lora_b = torch.randn(rows, rank).to(adapter or dtype).requires_grad_()
    bias = torch.randn(rows).to(adapter or dtype).requires_grad_()
    return x, qw, lora_a, lora_b, bias


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(y, inputs, torch.randn(y.shape).to(y.dtype))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float) -> None:
    x, qw, lora_a, lora_b, bias = problem((3, 5, 33, 2), torch.float64)
    seed = torch.tensor([-7]) if dropout_p else None
    weight = qw.operands()

    def qlora(x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
        return QLoRALinearFunction.apply(
            x, lora_a, lora_b, bias, 1.5, dropout_p, seed, False, *weight
        )

    def lora(x: Tensor, w: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
        return LoRALinearFunction.apply(x, w, lora_a, lora_b, bias, 1.5, dropout_p, seed)

    assert torch.autograd.gradcheck(qlora, (x, lora_a, lora_b, bias))
    dense = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lora, (x, dense, lora_a, lora_b, bias))
    assert torch.autograd.gradcheck(lambda x, b: qlk.quantized_linear(x, qw, b), (x, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_gradient_is_as_accurate_as_torchs(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    x, qw, lora_a, lora_b, bias = problem(sizes, dtype)
    inputs = (x, lora_a, lora_b, bias)
    got = gradients(qlk.qlora_linear(x, qw, lora_a, lora_b, 0.5, bias), *inputs)

    def plain(
        wide: torch.dtype, of: Callable[[Tensor], Tensor] = Tensor.clone
    ) -> tuple[Tensor, ...]:
        w = of(qlk.dequantize(qw, torch.float32).to(wide))
        x_, a, b, bias_ = (of(t.detach().to(wide)).requires_grad_() for t in inputs)
        y = F.linear(x_, w, bias_) + 0.5 * F.linear(F.linear(x_, a), b)
        torch.manual_seed(1)
        grad = of(torch.randn(y.shape).to(dtype).to(wide))
        return torch.autograd.grad(y, (x_, a, b, bias_), grad)

    exact, magnitudes = plain(torch.float64), plain(torch.float64, Tensor.abs)
    tokens, rank = sizes[0], sizes[3]
    # The two sums that a term may go through, of which no pair is longer.
    terms = sum(sizes) + 4
    for mine, *known in zip(got, exact, plain(dtype), magnitudes, strict=True):
        assert_right(mine, *known, terms, roundings=6, factors=tokens * rank)


def test_fp32_adapters_over_bf16_get_unrounded_gradients() -> None:
    x, qw, lora_a, lora_b, bias = problem((64, 96, 128, 8), torch.bfloat16, torch.float32)
    y = qlk.qlora_linear(x, qw, lora_a, lora_b, 0.5, bias)
    assert y.dtype == torch.bfloat16
    grad_x, *others = gradients(y, x, lora_a, lora_b, bias)
    assert grad_x.dtype == torch.bfloat16
    for gradient in others:
        assert gradient.dtype == torch.float32
        assert (gradient != gradient.bfloat16()).any()


def test_gradients_that_nobody_wants_are_not_made() -> None:
    x, qw, lora_a, lora_b, _ = problem(SIZES[0], torch.float32)
    frozen = x.detach()
    y = qlk.qlora_linear(frozen, qw, lora_a, lora_b.detach(), 0.5)
    y.sum().backward()
    assert frozen.grad is None and lora_b.grad is None and lora_a.grad is not None
    assert not qlk.quantized_linear(frozen, qw).requires_grad


@contextmanager
def saved_bytes() -> Iterator[list[Tensor]]:
    """Collects what autograd keeps for backward."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dense", [False, True])
def test_x_and_the_low_rank_product_are_all_that_is_saved(dense: bool, dropout_p: float) -> None:
    tokens, rows, cols, rank = 256, 96, 128, 4
    x, qw, lora_a, lora_b, _ = problem((tokens, rows, cols, rank), torch.float32)
    weight = qlk.dequantize(qw)
    parameters = [lora_a, lora_b, weight, *qw.operands()[:7]]
    held = {t.untyped_storage().data_ptr() for t in parameters if t is not None}
    with saved_bytes() as kept:
        if dense:
            lora_linear(x, weight, lora_a, lora_b, 1.0, None, dropout_p, True)
        else:
            qlk.qlora_linear(x, qw, lora_a, lora_b, 1.0, None, dropout_p, True)
    fresh = {t.untyped_storage().data_ptr(): t for t in kept}
    beyond = sum(
        t.numel() * t.element_size() for pointer, t in fresh.items() if pointer not in held
    )
    seed = 8 if dropout_p else 0
    assert beyond == x.numel() * 4 + tokens * rank * 4 + seed


@pytest.mark.parametrize("dense", [False, True])
def test_dropout_follows_torchs_generator_and_replays(dense: bool) -> None:
    x, qw, lora_a, lora_b, _ = problem((40, 64, 128, 8), torch.float32)
    weight = qlk.dequantize(qw)

    def run(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        if dense:
            y = lora_linear(x, weight, lora_a, lora_b, 0.5, None, 0.5, True)
        else:
            y = qlk.qlora_linear(x, qw, lora_a, lora_b, 0.5, None, 0.5, True)
        state = torch.get_rng_state()
        grad_x, grad_a = torch.autograd.grad(y, (x, lora_a), torch.ones_like(y))
        assert torch.equal(torch.get_rng_state(), state), "backward touched the generator"
        return y, grad_x, grad_a

    first, again, other = run(3), run(3), run(4)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    # The same mask acts in both directions.
    y, grad_x, _ = first
    assert_slope(y, grad_x, x, torch.ones_like(y), weight, (lora_a, lora_b), 0.5, 0.5)


def test_dropout_of_everything_leaves_the_base() -> None:
    x, qw, lora_a, lora_b, bias = problem(SIZES[1], torch.float32)
    y = qlk.qlora_linear(x, qw, lora_a, lora_b, 0.5, bias, 1.0, True)
    without = qlk.qlora_linear(x, qw, lora_a, torch.zeros_like(lora_b), 0.5, bias)
    assert torch.equal(y, without)
    grad_x, grad_a = torch.autograd.grad(y.sum(), (x, lora_a))
    assert torch.equal(grad_a, torch.zeros_like(lora_a)) and grad_x.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_activation_checkpointing(use_reentrant: bool, dropout_p: float) -> None:
    x, qw, lora_a, lora_b, bias = problem(SIZES[1], torch.float32)

    def layer(x: Tensor) -> Tensor:
        return qlk.qlora_linear(x, qw, lora_a, lora_b, 0.5, bias, dropout_p, True).tanh()

    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        for tensor in (x, lora_a, lora_b, bias):
            tensor.grad = None
        torch.manual_seed(5)
        run(x).sum().backward()
        results.append([tensor.grad for tensor in (x, lora_a, lora_b, bias)])
    for plain, checkpointed in zip(*results, strict=True):
        assert_bitwise_equal(checkpointed, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_and_leaves_scales_and_adapters(dtype: torch.dtype) -> None:
    x, qw, lora_a, lora_b, bias = problem(SIZES[1], torch.float32)
    inputs = (x, lora_a, lora_b, bias)
    with torch.autocast("cpu", dtype):
        y = qlk.qlora_linear(x, qw, lora_a, lora_b, 0.5, bias)
        dense = lora_linear(x, qlk.dequantize(qw), lora_a, lora_b, 0.5, bias)
    assert y.dtype == dense.dtype == dtype
    cast = x.detach().to(dtype)
    assert torch.equal(y, qlk.qlora_linear(cast, qw, lora_a, lora_b, 0.5, bias))
    for gradient in gradients(y, *inputs):
        assert gradient.dtype == torch.float32


def test_no_double_backward_is_pretended() -> None:
    x, qw, lora_a, lora_b, _ = problem(SIZES[0], torch.float32)
    y = qlk.qlora_linear(x, qw, lora_a, lora_b, 0.5)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
