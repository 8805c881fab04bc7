"""The written spec of quantized_matmul: plain fp64 maths, torch's autograd, the rounding order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlora_kernels.formats import list_formats
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import (
    dequantize_reference,
    quantized_matmul_backward_input_reference,
    quantized_matmul_reference,
)
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.shapes import RAGGED_WEIGHTS
from tests.problems import DTYPES, SCALES, random_weight
from tests.tolerances import assert_matmul

FP64 = {"rtol": 1e-13, "atol": 1e-13}


def one_weight(*values: float) -> WeightOperands:
    """A column of weights [N,1] that are exactly `values`, fp32."""
    table = torch.full((16,), torch.nan)
    table[: len(values)] = torch.tensor(values)
    codes = torch.arange(len(values) + len(values) % 2, dtype=torch.uint8)
    packed = (codes[0::2] << 4) | codes[1::2]
    ones = torch.ones(1)
    return WeightOperands(packed, ones, None, None, None, table, None, (len(values), 1), 64, 256)


@pytest.mark.parametrize("name", list_formats())
@pytest.mark.parametrize("scales", SCALES)
def test_forward_and_backward_are_plain_fp64_maths(name: str, scales: str) -> None:
    for seed, shape in enumerate(RAGGED_WEIGHTS):
        weight = random_weight(shape, 32, scales, name, seed)
        dense = dequantize_reference(weight, shape, torch.float64)
        rows, cols = shape
        x = torch.randn(5, cols, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(rows, dtype=torch.float64)
        grad_y = torch.randn(5, rows, dtype=torch.float64)
        expected = F.linear(x, dense, bias)
        (expected_grad,) = torch.autograd.grad(expected, x, grad_y)
        y = quantized_matmul_reference(x.detach(), weight, bias)
        torch.testing.assert_close(y, expected.detach(), **FP64)
        torch.testing.assert_close(y - bias, quantized_matmul_reference(x.detach(), weight), **FP64)
        grad_x = quantized_matmul_backward_input_reference(grad_y, weight)
        torch.testing.assert_close(grad_x, expected_grad, **FP64)


def test_backward_is_the_derivative_of_forward() -> None:
    weight = random_weight((7, 33), 32, "nested")

    class Matmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return quantized_matmul_reference(x, weight)

        @staticmethod
        def backward(ctx, grad_y: torch.Tensor) -> torch.Tensor:
            return quantized_matmul_backward_input_reference(grad_y, weight)

    x = torch.randn(3, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Matmul.apply, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_have_the_dtype_of_x(dtype: torch.dtype) -> None:
    weight = random_weight((6, 40))
    y = quantized_matmul_reference(torch.randn(2, 40).to(dtype), weight, torch.randn(6))
    grad_x = quantized_matmul_backward_input_reference(torch.randn(2, 6).to(dtype), weight)
    assert y.dtype == grad_x.dtype == dtype


def test_the_weight_is_rounded_to_the_dtype_of_x_first() -> None:
    # 1 + 2^-10 is 1 in bf16; times 512 in fp32 the difference would show.
    weight = one_weight(1 + 2.0**-10, 1 + 2.0**-7)
    x = torch.tensor([[512.0], [1.0]], dtype=torch.bfloat16)
    expected = torch.tensor([[512.0, 516.0], [1.0, 1 + 2.0**-7]], dtype=torch.bfloat16)
    assert_bitwise_equal(quantized_matmul_reference(x, weight), expected)
    exact = quantized_matmul_reference(x.float(), weight)
    assert_bitwise_equal(exact, torch.tensor([[512.5, 516.0], [1 + 2.0**-10, 1 + 2.0**-7]]))


def test_the_bias_is_added_before_the_one_rounding() -> None:
    # 257 is a tie between the bf16 neighbours 256 and 258: rounded first, the bias comes too late.
    weight = one_weight(1.0)
    x = torch.tensor([[256.0]], dtype=torch.bfloat16)
    for bias, expected in ((1.0, 256.0), (1.25, 258.0), (-255.75, 0.25)):
        y = quantized_matmul_reference(x, weight, torch.tensor([bias]))
        assert y.item() == expected
    # A bias of a wider dtype is not rounded to x's.
    assert quantized_matmul_reference(-x, weight, torch.tensor([257.0])).item() == 1.0


def test_products_are_summed_in_fp32() -> None:
    # In bf16 256 + 1 stays 256, however often it is done.
    weight = random_weight((1, 64))._replace(
        codes=torch.zeros(32, dtype=torch.uint8), absmax=torch.ones(1), codebook=torch.ones(16)
    )
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    x[0, 0] = 256
    assert quantized_matmul_reference(x, weight).item() == 320.0
    assert quantized_matmul_backward_input_reference(x[:, :1], weight).unique().item() == 256.0


def test_batch_invariant_rows_do_not_depend_on_the_others() -> None:
    weight = random_weight((65, 257), 32)
    x = torch.randn(19, 257)
    alone = torch.cat([quantized_matmul_reference(row[None], weight, None, True) for row in x])
    together = quantized_matmul_reference(x, weight, batch_invariant=True)
    assert_bitwise_equal(together, alone)
    assert_bitwise_equal(quantized_matmul_reference(x[3:8], weight, None, True), alone[3:8])
    assert_matmul(together, x, weight)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (5, 64)], ids=str)
def test_empty_operands(shape: tuple[int, int], batch_invariant: bool) -> None:
    rows, cols = shape
    weight = random_weight(shape)
    bias = torch.randn(rows)
    for tokens in (0, 2):
        x = torch.randn(tokens, cols)
        y = quantized_matmul_reference(x, weight, bias, batch_invariant)
        assert y.shape == (tokens, rows)
        if cols == 0:
            assert_bitwise_equal(y, bias.expand(tokens, rows))
        grad_x = quantized_matmul_backward_input_reference(torch.randn(tokens, rows), weight)
        assert grad_x.shape == (tokens, cols) and (rows or not grad_x.any())
