"""The matmuls, their backwards and dropout as torch ops, and the border's checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.library import opcheck

import qlora_kernels as qlk
from qlora_kernels.backends import OPS
from qlora_kernels.errors import ArgumentError, ArgumentTypeError, BackendError
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.tolerances import assert_linear

ops = torch.ops.qlora_kernels


def operands_of(double_quant: bool = True, shape: tuple[int, int] = (33, 65)) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return qlk.quantize(torch.randn(shape), double_quant=double_quant).operands()


@pytest.mark.parametrize(("tokens", "nested"), [(0, True), (1, False), (40, True)])
def test_opcheck(tokens: int, nested: bool) -> None:
    weight = operands_of(nested)
    x, grad_y = torch.randn(tokens, 65), torch.randn(tokens, 33)
    lora_a, lora_b, bias = torch.randn(4, 65), torch.randn(33, 4), torch.randn(33)
    seed = torch.tensor([5])
    opcheck(ops.quantized_matmul.default, (x, *weight, bias, False))
    opcheck(ops.quantized_matmul.default, (x, *weight))
    opcheck(ops.quantized_matmul_backward_input.default, (grad_y, *weight))
    forward = (x, *weight, lora_a, lora_b, 0.5, bias, 0.25, seed, False)
    opcheck(ops.qlora_linear.default, forward)
    opcheck(ops.qlora_linear.default, forward[: -len((bias, 0.25, seed, False))])
    xa = torch.randn(tokens, 4)
    for needs in ([True, True, True], [False, True, False], [True, False, True]):
        backward = (grad_y, x, xa, *weight, lora_a, lora_b, 0.5, 0.25, seed, needs)
        opcheck(ops.qlora_linear_backward.default, backward)
    for p in (0.0, 0.5, 1.0):
        opcheck(ops.dropout.default, (x, p, seed))


def test_the_table_of_double_quantized_scales_may_be_left_out() -> None:
    weight = operands_of()
    x = torch.randn(3, 65)
    without = weight._replace(scale_codebook=None)
    assert torch.equal(ops.quantized_matmul(x, *weight), ops.quantized_matmul(x, *without))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_a_caller_does_not_reach_into_a_kernel(dtype: torch.dtype) -> None:
    weight = operands_of()
    x = torch.randn(40, 65, dtype=dtype)
    with qlk.backend("reference"):
        expected = ops.quantized_matmul(x, *weight)
        with torch.autocast("cpu", torch.bfloat16):
            got = ops.quantized_matmul(x, *weight)
    assert_bitwise_equal(got, expected)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (7,), (2, 3), (2, 0, 3)], ids=str)
def test_shapes_are_those_of_f_linear(lead: tuple[int, ...]) -> None:
    qw = qlk.quantize(torch.randn(33, 65))
    dense, bias, x = qlk.dequantize(qw), torch.randn(33), torch.randn(*lead, 65)
    lora_a, lora_b = torch.randn(4, 65), torch.zeros(33, 4)
    for y in (
        qlk.quantized_linear(x, qw, bias),
        qlk.qlora_linear(x, qw, lora_a, lora_b, 1.0, bias),
    ):
        assert y.shape == (*lead, 33)
        assert_linear(y, x, dense.double(), bias)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_weights(shape: tuple[int, int]) -> None:
    qw = qlk.quantize(torch.randn(shape))
    x = torch.randn(3, shape[1], requires_grad=True)
    y = qlk.quantized_linear(x, qw, torch.ones(shape[0]))
    assert torch.equal(y, torch.ones(3, shape[0]))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, shape[1]))


@pytest.mark.parametrize("name", qlk.list_formats())
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_non_contiguous_operands(name: str, backend: str) -> None:
    torch.manual_seed(0)
    qw = qlk.quantize(torch.randn(40, 96), name)
    x, lora_a, lora_b = torch.randn(96, 12).t(), torch.randn(96, 4).t(), torch.randn(4, 40).t()
    with qlk.backend(backend):
        got = qlk.qlora_linear(x, qw, lora_a, lora_b, 2.0)
        expected = qlk.qlora_linear(
            x.contiguous(), qw, lora_a.contiguous(), lora_b.contiguous(), 2.0
        )
    assert_bitwise_equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_batch_invariance(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qw = qlk.quantize(torch.randn(96, 256))
    x = torch.randn(70, 256).to(dtype)
    lora_a, lora_b = torch.randn(8, 256), torch.randn(96, 8)
    whole = qlk.qlora_linear(x, qw, lora_a, lora_b, 0.5, batch_invariant=True)
    plain = qlk.quantized_linear(x, qw, batch_invariant=True)
    for begin, end in ((0, 1), (3, 5), (60, 70), (0, 33)):
        part = x[begin:end]
        alone = qlk.qlora_linear(part, qw, lora_a, lora_b, 0.5, batch_invariant=True)
        assert_bitwise_equal(alone, whole[begin:end])
        assert_bitwise_equal(qlk.quantized_linear(part, qw, batch_invariant=True), plain[begin:end])


def bad_calls() -> dict[str, tuple[Callable[[], object], type[Exception], str]]:
    """What the border refuses: id -> call, error, message."""
    qw = qlk.quantize(torch.randn(6, 8))
    flat = qlk.quantize(torch.randn(48))
    x, a, b = torch.randn(2, 8), torch.randn(3, 8), torch.randn(6, 3)
    double = torch.randn(6, dtype=torch.float64)
    kind, value = ArgumentTypeError, ArgumentError
    return {
        "x a list": (lambda: qlk.quantized_linear([1.0], qw), kind, "x must be a tensor, got list"),
        "x int": (lambda: qlk.quantized_linear(x.int(), qw), kind, "float64, got torch.int32"),
        "x shape": (lambda: qlk.quantized_linear(x[:, :7], qw), value, r"x must be \[..., 8\]"),
        "x scalar": (lambda: qlk.quantized_linear(torch.tensor(1.0), qw), value, "x must be"),
        "x device": (lambda: qlk.quantized_linear(x.to("meta"), qw), value, "on cpu"),
        "qw dense": (lambda: qlk.quantized_linear(x, x), kind, "qw must be a QuantizedWeight"),
        "qw 1-D": (lambda: qlk.quantized_linear(x, flat), value, "qw must be 2-D"),
        "bias size": (lambda: qlk.quantized_linear(x, qw, x[0]), value, r"bias must be \[6\]"),
        "bias fp64": (lambda: qlk.quantized_linear(x, qw, double), kind, "at most float32"),
        "a 1-D": (lambda: qlk.qlora_linear(x, qw, a[0], b, 1.0), value, r"lora_a must be \[rank"),
        "a size": (lambda: qlk.qlora_linear(x, qw, a[:, 1:], b, 1.0), value, r"lora_a must be \[r"),
        "b size": (lambda: qlk.qlora_linear(x, qw, a, b[:, 1:], 1.0), value, r"lora_b must be \[6"),
        "b int": (lambda: qlk.qlora_linear(x, qw, a, b.int(), 1.0), kind, "lora_b must be"),
        "scaling": (lambda: qlk.qlora_linear(x, qw, a, b, float("nan")), value, "scaling must be"),
        "scaling str": (lambda: qlk.qlora_linear(x, qw, a, b, "1"), kind, "scaling must be"),
        "dropout": (
            lambda: qlk.qlora_linear(x, qw, a, b, 1.0, dropout_p=1.5),
            value,
            "dropout_p must be in 0 … 1, got 1.5",
        ),
        "explain": (lambda: qlk.explain("matmul", qw), value, "op must be one of"),
        "explain 1-D": (lambda: qlk.explain("qlora_linear", flat), value, "2-D for qlora_linear"),
        "explain M": (lambda: qlk.explain("dropout", qw, tokens=-1), value, "tokens must be at"),
        "explain dtype": (lambda: qlk.explain("dropout", qw, "bf16"), kind, "dtype, got 'bf16'"),
        "format": (lambda: qlk.quantize(x, "NF4"), value, r"quantize: format must be .*got 'NF4'"),
        "dtype": (lambda: qlk.dequantize(qw, "bf16"), kind, r"torch.bfloat16, got 'bf16'"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_refused_by_name(name: str) -> None:
    call, error, message = bad_calls()[name]
    with pytest.raises(error, match=message):
        call()


def test_fp64_runs_on_the_reference_alone() -> None:
    qw = qlk.quantize(torch.randn(6, 8))
    x = torch.randn(2, 8, dtype=torch.float64)
    assert qlk.quantized_linear(x, qw).dtype == torch.float64
    with qlk.backend("cpu"), pytest.raises(BackendError, match="dtype must be one of"):
        qlk.quantized_linear(x, qw)


@pytest.mark.parametrize("op", OPS)
def test_explain_speaks_of_every_op(op: str) -> None:
    text = qlk.explain(op, qlk.quantize(torch.randn(64, 64)), tokens=3, rank=8)
    assert text.startswith(op) and text.count("chosen") == 1 and "reference" in text
