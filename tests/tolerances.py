"""Bounds that several test files share, and what they are measured against.

A matmul's error, against fp64 with the fp32-dequantized Ŵ, is at most twice that of torch's own
operations in the same dtype on Ŵ rounded to it, with a floor of 0.6 unit roundoff; the factor and
the floor have their home in `qlora_kernels.testing.errors`. That compares two norms of rounding
errors, which says nothing about a handful of numbers: results with fewer than `FEW` independent
errors are instead held, element by element, to the classical bound for a sum of rounded terms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import dequantize_reference, dropout_reference
from qlora_kernels.testing.errors import assert_as_accurate, unit_roundoff
from tests.problems import QLoRAProblem

# The ratio of two norms of that many errors strays from its mean by about 10 %.
FEW = 64
FP32_ROUNDOFF = unit_roundoff(torch.float32)


@functools.lru_cache(maxsize=4)
def exact_weight(weight: WeightOperands) -> torch.Tensor:
    """Ŵ [N,K] in fp64, as it is before any rounding to another dtype. Not to be changed."""
    return dequantize_reference(weight, weight.shape, torch.float32).double()


def rounded_weight(weight: WeightOperands, dtype: torch.dtype) -> torch.Tensor:
    """Ŵ [N,K] as a dense layer of `dtype` holds it."""
    return exact_weight(weight).to(dtype)


def assert_right(
    got: torch.Tensor,
    exact: torch.Tensor,
    torchs: torch.Tensor,
    magnitude: torch.Tensor,
    terms: int,
    roundings: float = 3.0,
    factors: int | None = None,
) -> None:
    """`got` is as accurate as it must be: by norms, or by elements if its errors are few.

    Args:
        got: the result under test.
        exact: the same in fp64.
        torchs: the same by torch's own operations in got's dtype.
        magnitude: fp64, the sum of the terms' magnitudes, which scales the rounding errors.
        terms: number of terms in the longest sum, each of which may round once in fp32.
        roundings: how often a term is rounded to got's dtype on its way (Ŵ, xa, the result, …).
        factors: number of rounded intermediate results (xa, u) that all of `got` is made of.

    Raises:
        AssertionError: naming the error and the bound, or the worst element.
    """
    if min(got.numel(), got.numel() if factors is None else factors) >= FEW:
        assert_as_accurate(got, exact, torchs)
        return
    assert got.dtype == torchs.dtype and got.shape == exact.shape
    unit = terms * FP32_ROUNDOFF
    unit += 0.0 if got.dtype == torch.float32 else roundings * unit_roundoff(got.dtype)
    smallest = torch.finfo(got.dtype).tiny
    excess = (got.double() - exact).abs() - unit * magnitude - smallest
    # NaN must fail: it is not below any bound.
    wrong = ~(excess <= 0)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {got.numel()} elements off, first at "
        f"{wrong.nonzero()[0].tolist()}: got {got[wrong][0].item()!r}, "
        f"exact {exact[wrong][0].item()!r}, bound {(unit * magnitude)[wrong][0].item():.2e}"
    )


def assert_matmul(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: WeightOperands,
    bias: torch.Tensor | None = None,
) -> None:
    """y [M,N] is x Ŵᵀ + bias to within the rule above."""
    assert_linear(y, x, exact_weight(weight), bias)


def assert_linear(
    y: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """y [...,N] is x [...,K] times a dense weight [N,K] in fp64, + bias, to within that rule."""
    y64 = x.double() @ exact.T
    magnitude = x.double().abs() @ exact.abs().T
    if bias is not None:
        y64 = y64 + bias.double()
        magnitude = magnitude + bias.double().abs()
    torchs = F.linear(x, exact.to(x.dtype), None if bias is None else bias.to(x.dtype))
    assert_right(y, y64, torchs, magnitude, exact.shape[1] + 2)


def assert_slope(
    y: torch.Tensor,
    grad_x: torch.Tensor,
    x: torch.Tensor,
    grad_y: torch.Tensor,
    dense: torch.Tensor,
    adapter: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
    dropout_p: float,
) -> None:
    """Of y [M,N] in fp32 without a bias, grad_x is the derivative, dropout's mask included.

    y is linear in x, so ⟨grad_y, y⟩ = ⟨grad_x, x⟩: another mask in backward breaks that. Each
    product that the two sums are made of went through as many roundings as the sums it is in have
    terms, and four more; `dense` is the weight [N,K], `adapter` A [R,K] and B [N,R].
    """
    a, b = (part.detach().double().abs() for part in adapter)
    weight, g, at = dense.detach().double(), grad_y.double(), x.detach().double()
    through = (at.abs() / (1 - dropout_p)) @ a.T @ b.T
    magnitude = (g.abs() * (at.abs() @ weight.abs().T + abs(scaling) * through)).sum()
    bound = (sum(weight.shape) + 2 * len(a) + 8) * FP32_ROUNDOFF * magnitude
    found = (grad_x.double() * at).sum() - (g * y.detach().double()).sum()
    assert found.abs() <= bound, f"⟨grad_x, x⟩ less ⟨grad_y, y⟩ is {found:.3e}, bound {bound:.3e}"


def assert_matmul_backward(
    grad_x: torch.Tensor, grad_y: torch.Tensor, weight: WeightOperands
) -> None:
    """grad_x [M,K] is grad_y Ŵ to within the rule above."""
    exact = exact_weight(weight)
    magnitude = grad_y.double().abs() @ exact.abs()
    torchs = grad_y @ rounded_weight(weight, grad_y.dtype)
    assert_right(grad_x, grad_y.double() @ exact, torchs, magnitude, weight.shape[0] + 1)


def assert_qlora(y: torch.Tensor, xa: torch.Tensor, problem: QLoRAProblem) -> None:
    """y [M,N] and xa [M,R] of a forward; torch's own: F.linear + F.linear(F.linear) * scaling."""
    p = problem
    dtype, (_, cols) = p.x.dtype, p.weight.shape
    exact = exact_weight(p.weight)
    a64, b64 = p.lora_a.double(), p.lora_b.double()
    dropped64 = dropout_reference(p.x.double(), p.dropout_p, p.seed)
    a, b = p.lora_a.to(dtype), p.lora_b.to(dtype)
    bias = None if p.bias is None else p.bias.to(dtype)

    torchs_xa = F.linear(dropout_reference(p.x, p.dropout_p, p.seed), a)
    xa64, xa_magnitude = dropped64 @ a64.T, dropped64.abs() @ a64.abs().T
    # Roundings: dropout's result, A, xa.
    assert_right(xa, xa64, torchs_xa, xa_magnitude, cols + 2, roundings=4)

    torchs = F.linear(p.x, rounded_weight(p.weight, dtype), bias)
    torchs = torchs + F.linear(torchs_xa, b) * p.scaling
    y64 = p.x.double() @ exact.T + p.scaling * (xa64 @ b64.T)
    magnitude = p.x.double().abs() @ exact.abs().T
    magnitude = magnitude + abs(p.scaling) * (xa_magnitude @ b64.abs().T)
    if p.bias is not None:
        y64, magnitude = y64 + p.bias.double(), magnitude + p.bias.double().abs()
    assert_right(y, y64, torchs, magnitude, cols + len(a) + 4, roundings=6, factors=xa.numel())


def assert_qlora_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor], problem: QLoRAProblem
) -> None:
    """grad_x [M,K], grad_a [R,K], grad_b [N,R] of a backward whose xa came from a forward.

    Torch's own are the products that its autograd would take, in x's dtype.
    """
    grad_x, grad_a, grad_b = gradients
    assert_grad_x(grad_x, [problem])
    assert_adapter_gradients(grad_a, grad_b, problem)


def assert_grad_x(grad_x: torch.Tensor, members: Sequence[QLoRAProblem]) -> None:
    """grad_x [M,K] is the sum of those of layers that share x; torch's own are added in x's
    dtype."""
    exact, magnitude, torchs = [], [], []
    for p in members:
        dtype, weight = p.x.dtype, exact_weight(p.weight)
        g64, b64 = p.grad_y.double(), p.lora_b.double()
        u64, u_magnitude = p.scaling * (g64 @ b64), abs(p.scaling) * (g64.abs() @ b64.abs())
        u = (p.grad_y @ p.lora_b.to(dtype)) * p.scaling
        a64 = p.lora_a.double()
        through, through_magnitude, narrow = (
            dropout_reference(product, p.dropout_p, p.seed)
            for product in (u64 @ a64, u_magnitude @ a64.abs(), u @ p.lora_a.to(dtype))
        )
        exact.append(g64 @ weight + through)
        magnitude.append(g64.abs() @ weight.abs() + through_magnitude)
        torchs.append(p.grad_y @ rounded_weight(p.weight, dtype) + narrow)
    factors = len(members[0].x) * sum(len(p.lora_a) for p in members)
    terms = sum(2 * p.weight.shape[0] + len(p.lora_a) + 4 for p in members)
    sums = [functools.reduce(torch.add, parts) for parts in (exact, torchs, magnitude)]
    assert_right(grad_x, *sums, terms, roundings=6, factors=factors)


def assert_adapter_gradients(
    grad_a: torch.Tensor, grad_b: torch.Tensor, problem: QLoRAProblem
) -> None:
    """grad_a [R,K] and grad_b [N,R] of a layer, each in its adapter's dtype."""
    p = problem
    dtype, tokens, (rows, cols) = p.x.dtype, len(p.x), p.weight.shape
    a64, b64, g64 = p.lora_a.double(), p.lora_b.double(), p.grad_y.double()
    dropped64 = dropout_reference(p.x.double(), p.dropout_p, p.seed)
    u64 = p.scaling * (g64 @ b64)
    u_magnitude = abs(p.scaling) * (g64.abs() @ b64.abs())

    a, b = p.lora_a.to(dtype), p.lora_b.to(dtype)
    dropped = dropout_reference(p.x, p.dropout_p, p.seed)
    u = (p.grad_y @ b) * p.scaling
    torchs = (u.T @ dropped).to(p.lora_a.dtype)
    magnitude = u_magnitude.T @ dropped64.abs()
    _assert_adapter(grad_a, u64.T @ dropped64, torchs, magnitude, tokens + rows, u)
    torchs = (p.grad_y.T @ F.linear(dropped, a) * p.scaling).to(p.lora_b.dtype)
    grad_b64 = p.scaling * (g64.T @ (dropped64 @ a64.T))
    magnitude = abs(p.scaling) * (g64.abs().T @ (dropped64.abs() @ a64.abs().T))
    _assert_adapter(grad_b, grad_b64, torchs, magnitude, tokens + cols, u)


def _assert_adapter(
    got: torch.Tensor,
    exact: torch.Tensor,
    torchs: torch.Tensor,
    magnitude: torch.Tensor,
    terms: int,
    factor: torch.Tensor,
) -> None:
    """An adapter's gradient: in its own dtype, of a factor [M,R] that was rounded to x's dtype."""
    assert got.dtype == torchs.dtype
    # Element by element the bound is that of the coarser of the two dtypes.
    if min(got.numel(), factor.numel()) < FEW:
        coarse = max(factor.dtype, got.dtype, key=unit_roundoff)
        got, torchs = got.to(coarse), torchs.to(coarse)
    assert_right(got, exact, torchs, magnitude, terms + 4, roundings=6, factors=factor.numel())
