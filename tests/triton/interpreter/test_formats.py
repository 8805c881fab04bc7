"""Every registered format through the Triton kernels: the same bytes and bits as the reference,
products and gradients as accurate as torch's. Steps that are not kernels (unpacking, shifts, tables
per row) are those of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import qlora_kernels as qlk
from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal

# With codes in 4 bits and one table a kernel takes part in it all.
FORMATS = qlk.list_formats()
SHAPE, TOKENS, RANK, SCALING = (16, 96), 5, 4, 0.5


def weight(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FORMATS)
def test_quantizes_to_the_references_bytes(name: str) -> None:
    for shape in (SHAPE, (7, 33)):
        with qlk.backend("reference"):
            wanted = qlk.quantize(weight(shape), name)
        with qlk.backend("triton"):
            got = qlk.quantize(weight(shape), name)
        for field, tensor in wanted.tensors().items():
            assert torch.equal(got.tensors()[field], tensor), (field, shape)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantizes_to_the_references_bits(name: str) -> None:
    for shape in (SHAPE, (7, 33)):
        qw = qlk.quantize(weight(shape), name)
        for dtype in (torch.float32, torch.bfloat16):
            with qlk.backend("reference"):
                wanted = qlk.dequantize(qw, dtype)
            with qlk.backend("triton"):
                assert_bitwise_equal(qlk.dequantize(qw, dtype), wanted, f"{name} {shape}")


@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_backward(name: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    n, k = SHAPE
    qw = qlk.quantize(weight(), name)
    dense = qlk.dequantize(qw)
    tensors = {"x": normal(TOKENS, k), "a": normal(RANK, k) / 4, "b": normal(n, RANK) / 4}
    grad = normal(TOKENS, n)

    def run(product: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors.values()]
        y = product(*leaves)
        y.backward(grad.to(dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def plain(x: Any, a: Any, b: Any) -> torch.Tensor:
        return F.linear(x, dense.to(x.dtype)) + F.linear(F.linear(x, a), b) * SCALING

    with qlk.backend("triton"):
        got = run(lambda x, a, b: qlk.qlora_linear(x, qw, a, b, SCALING), torch.float32)
    exact, torchs = run(plain, torch.float64), run(plain, torch.float32)
    for ours, right, theirs in zip(got, exact, torchs, strict=True):
        assert_as_accurate(ours, right, theirs)
