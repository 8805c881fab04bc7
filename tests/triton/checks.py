"""What the Triton kernels must do, on any device: the interpreter's tests run these checks on CPU
tensors, the GPU's tests on CUDA tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qlora_kernels.backends import launch_config
from qlora_kernels.backends.triton.dequantize import dequantize_many_triton, dequantize_triton
from qlora_kernels.backends.triton.double_quantize import double_quantize_triton
from qlora_kernels.backends.triton.dropout import dropout_triton
from qlora_kernels.backends.triton.qlora_linear import (
    qlora_linear_backward_triton,
    qlora_linear_triton,
)
from qlora_kernels.backends.triton.quantize import quantize_triton
from qlora_kernels.backends.triton.quantized_matmul import (
    quantized_matmul_backward_input_triton,
    quantized_matmul_triton,
)
from qlora_kernels.formats import Codebook, get_format, list_formats
from qlora_kernels.formats.dynamic8 import dynamic8_table
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import (
    dequantize_reference,
    double_quantize_reference,
    dropout_reference,
    quantize_reference,
)
from qlora_kernels.testing.errors import assert_bitwise_equal
from tests.problems import (
    QLoRAProblem,
    operands_on,
    problem_on,
    random_qlora,
    random_weight,
)
from tests.tolerances import (
    assert_matmul,
    assert_matmul_backward,
    assert_qlora,
    assert_qlora_backward,
)

CODEBOOKS = {name: get_format(name).codebook for name in ("nf4", "fp4", "int4")} | {
    "two": Codebook("two", values=[-1.0, 1.0]),
    "unsorted": Codebook("unsorted", values=[0.9, -0.2, 0.4, -1.0, 0.1]),
    "duplicates": Codebook("duplicates", values=[-1.0, 0.25, 0.25, 1.0, -1.0, 0.5]),
    "one_sided": Codebook("one_sided", values=[0.1 * i for i in range(1, 17)]),
}
ALL = (True, True, True)
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# What many tokens are in tests that look at the paths which only they take.
MANY_TOKENS = 51


@contextmanager
def many_tokens_are_few() -> Iterator[None]:
    """Inside, or in what it decorates, `MANY_TOKENS` are too many for fused products. The
    interpreter takes seconds for as many as really are."""
    most = launch_config.FUSED_TOKENS
    launch_config.FUSED_TOKENS = MANY_TOKENS - 1
    try:
        yield
    finally:
        launch_config.FUSED_TOKENS = most


def qlora_on(device: torch.device, *arguments: Any, **options: Any) -> QLoRAProblem:
    """`random_qlora(…)` on `device`."""
    return problem_on(device, random_qlora(*arguments, **options))


def random_problem(seed: int, most_tokens: int = 600) -> QLoRAProblem:
    """A problem of random sizes, formats, dtypes and options on the CPU.

    Of sizes that a kernel is compiled for there are a few values each, else 10,000 problems would
    be as many compilations.
    """
    draw = random.Random(seed)
    block_size = draw.choice((32, 64, 256))
    cols = draw.choice((64, 96, 256, 320, 100, 131))
    rows = draw.choice((draw.randrange(1, 300), 16 * draw.randrange(1, 20)))
    tokens = draw.choice((1, draw.randrange(2, 17), draw.randrange(17, 130), most_tokens))
    scales = draw.choice(("absmax", "nested"))
    format_name = draw.choice(list_formats())
    dropout_p = draw.choice((0.0, 0.0, 0.25))
    return random_qlora(
        tokens,
        random_weight((rows, cols), block_size, scales, format_name, seed),
        draw.choice((1, 4, 16, 40)),
        draw.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
        torch.float32,
        bias_dtype=draw.choice((None, torch.float32)),
        dropout_p=dropout_p,
        seed=seed,
    )


def encoder_arguments(codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor, int]:
    """boundaries, rank_codes and zero_code for codes against the exact absmax."""
    encoder = codebook.encoder
    boundaries = torch.tensor(encoder.boundaries, dtype=torch.float32)
    return boundaries, torch.tensor(encoder.rank_codes, dtype=torch.uint8), encoder.zero_code


def decoded_arguments(codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The same for codes against decoded scales."""
    encoder = codebook.exact_encoder
    boundaries = torch.tensor(encoder.boundaries, dtype=torch.float64)
    return boundaries, torch.tensor(encoder.rank_codes, dtype=torch.uint8), encoder.zero_code


def check_quantize(
    device: torch.device,
    weight: torch.Tensor,
    codebook: Codebook,
    block_size: int,
    scales: torch.Tensor | None = None,
) -> None:
    """Codes and absmax are the reference's; `scales` are decoded scales to encode against."""
    arguments = (decoded_arguments if scales is not None else encoder_arguments)(codebook)
    expected = quantize_reference(weight, *arguments, block_size, scales)
    boundaries, rank_codes, zero_code = arguments
    got = quantize_triton(
        weight.to(device),
        boundaries.to(device),
        rank_codes.to(device),
        zero_code,
        block_size,
        None if scales is None else scales.to(device),
    )
    for name, mine, theirs in zip(("codes", "absmax"), got, expected, strict=True):
        assert_bitwise_equal(mine.cpu(), theirs, name)


def check_double_quantize(
    device: torch.device, absmax: torch.Tensor, scale_block_size: int = 256
) -> None:
    """Codes, scales and offset are the reference's."""
    table = dynamic8_table()
    got = double_quantize_triton(absmax.to(device), table.to(device), scale_block_size)
    expected = double_quantize_reference(absmax, table, scale_block_size)
    names = ("scale_codes", "scale_absmax", "scale_offset")
    for name, mine, theirs in zip(names, got, expected, strict=True):
        assert_bitwise_equal(mine.cpu(), theirs, name)


def check_dequantize(
    device: torch.device,
    operands: WeightOperands,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> None:
    """The dense weight is the reference's, into `out` if given."""
    shape = operands.shape
    got = dequantize_triton(operands_on(device, operands), shape, dtype, out)
    assert out is None or got is out
    assert_bitwise_equal(got.cpu(), dequantize_reference(operands, shape, dtype))


def check_dequantize_many(
    device: torch.device,
    operands: Sequence[WeightOperands],
    dtype: torch.dtype,
    outs: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """Every dense weight is the reference's, into `outs` where given."""
    given = outs if outs is not None else [None] * len(operands)
    results = dequantize_many_triton([operands_on(device, one) for one in operands], dtype, given)
    for got, one, out in zip(results, operands, given, strict=True):
        assert out is None or got is out
        assert_bitwise_equal(got.cpu(), dequantize_reference(one, one.shape, dtype))


def check_dropout(
    device: torch.device, x: torch.Tensor, dropout_p: float, seed: torch.Tensor
) -> None:
    """The mask and the scaled elements are the reference's."""
    got = dropout_triton(x.to(device), dropout_p, seed.to(device))
    assert_bitwise_equal(got.cpu(), dropout_reference(x, dropout_p, seed))


def forward(p: QLoRAProblem, invariant: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """y and xa, on the problem's device."""
    y, xa = qlora_linear_triton(
        p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, p.dropout_p, p.seed, invariant
    )
    return y, xa


def backward(p: QLoRAProblem, xa: torch.Tensor, needs: tuple[bool, bool, bool] = ALL) -> Gradients:
    """grad_x, grad_a, grad_b, on the problem's device."""
    grad_x, grad_a, grad_b = qlora_linear_backward_triton(
        p.grad_y,
        p.x,
        xa,
        p.weight,
        p.lora_a,
        p.lora_b,
        p.scaling,
        p.dropout_p,
        p.seed,
        needs,
    )
    return grad_x, grad_a, grad_b


def check_qlora(device: torch.device, problem: QLoRAProblem, invariant: bool = False) -> None:
    """Forward and backward to within the matmul rule of `tests/tolerances.py`."""
    there = problem_on(device, problem)
    y, xa = forward(there, invariant)
    assert_qlora(y.cpu(), xa.cpu(), problem)
    grad_x, grad_a, grad_b = backward(there, xa)
    assert_qlora_backward((grad_x.cpu(), grad_a.cpu(), grad_b.cpu()), problem)


def check_matmul(device: torch.device, problem: QLoRAProblem, invariant: bool = False) -> None:
    """The products without an adapter, to within the same rule."""
    there = problem_on(device, problem)
    y = quantized_matmul_triton(there.x, there.weight, there.bias, invariant)
    assert_matmul(y.cpu(), problem.x, problem.weight, problem.bias)
    grad_x = quantized_matmul_backward_input_triton(there.grad_y, there.weight)
    assert_matmul_backward(grad_x.cpu(), problem.grad_y, problem.weight)


def check_repeats(device: torch.device, problem: QLoRAProblem) -> None:
    """Two runs agree in every bit: no sum depends on the order in which programs finish."""
    there = problem_on(device, problem)
    runs = []
    for _ in range(2):
        y, xa = forward(there)
        runs.append((y, xa, *backward(there, xa)))
    for one, two in zip(*runs, strict=True):
        assert_bitwise_equal(two.cpu(), one.cpu())
