"""More than 2^31 weights: offsets that 32 bits cannot hold, on every op. Takes about 7 GiB."""

from __future__ import annotations

import psutil
import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels.formats.quantized_weight import QuantizedWeight
from qlora_kernels.testing.errors import assert_as_accurate, assert_bitwise_equal

COLS = 4096
ROWS = 2**31 // COLS + 9
TAIL = 8  # the last rows begin beyond 2^31

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        psutil.virtual_memory().available < 12 << 30, reason="needs 12 GiB of free memory"
    ),
]


@pytest.fixture(scope="module")
def large() -> QuantizedWeight:
    """Random codes; scales of the tail differ from those that a wrapped offset would find."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.zeros(ROWS * COLS // 2, dtype=torch.uint8)
    tail = TAIL * COLS // 2
    codes[-tail:] = torch.randint(0, 256, (tail,), dtype=torch.uint8, generator=generator)
    absmax = torch.ones(ROWS * COLS // 64)
    absmax[-TAIL * COLS // 64 :] = torch.rand(TAIL * COLS // 64, generator=generator) + 2.0
    return QuantizedWeight.from_parts(
        codes, shape=(ROWS, COLS), dtype=torch.bfloat16, format="nf4", absmax=absmax
    )


@pytest.fixture(scope="module")
def tail(large: QuantizedWeight) -> QuantizedWeight:
    """The last rows on their own."""
    assert large.absmax is not None
    return QuantizedWeight.from_parts(
        large.codes[-TAIL * COLS // 2 :].clone(),
        shape=(TAIL, COLS),
        dtype=large.dtype,
        format="nf4",
        absmax=large.absmax[-TAIL * COLS // 64 :].clone(),
    )


def test_quantize_and_dequantize_beyond_two_to_the_31(
    large: QuantizedWeight, tail: QuantizedWeight
) -> None:
    dense = qlk.dequantize(large)
    with qlk.backend("reference"):
        expected = qlk.dequantize(tail)
    assert_bitwise_equal(dense[-TAIL:], expected)
    again = qlk.quantize(dense, double_quant=False)
    ours = qlk.quantize(dense[-TAIL:].clone(), double_quant=False)
    assert again.absmax is not None and ours.absmax is not None
    assert_bitwise_equal(again.codes[-ours.codes.numel() :], ours.codes)
    assert_bitwise_equal(again.absmax[-ours.absmax.numel() :], ours.absmax)


@pytest.mark.parametrize("tokens", [1, 50])
def test_matmul_beyond_two_to_the_31(
    large: QuantizedWeight, tail: QuantizedWeight, tokens: int
) -> None:
    torch.manual_seed(1)
    x, lora_a = torch.randn(tokens, COLS), torch.randn(4, COLS)
    lora_b = torch.zeros(ROWS, 4)
    lora_b[-TAIL:] = torch.randn(TAIL, 4)
    y = qlk.qlora_linear(x, large, lora_a, lora_b, 0.5)[:, -TAIL:]
    w = qlk.dequantize(tail, torch.float32)
    exact = x.double() @ w.double().t()
    exact += 0.5 * (x.double() @ lora_a.double().t()) @ lora_b[-TAIL:].double().t()
    plain = x @ w.t() + 0.5 * ((x @ lora_a.t()) @ lora_b[-TAIL:].t())
    assert_as_accurate(y, exact, plain)


@pytest.mark.parametrize("tokens", [1, 50])
def test_grad_x_beyond_two_to_the_31(
    large: QuantizedWeight, tail: QuantizedWeight, tokens: int
) -> None:
    torch.manual_seed(2)
    grad_y = torch.zeros(tokens, ROWS)
    grad_y[:, -TAIL:] = torch.randn(tokens, TAIL)
    got = torch.ops.qlora_kernels.quantized_matmul_backward_input(grad_y, *large.operands())
    w, few = qlk.dequantize(tail, torch.float32), grad_y[:, -TAIL:]
    assert_as_accurate(got, few.double() @ w.double(), few @ w)
