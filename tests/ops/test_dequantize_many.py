"""dequantize_many: every weight as dequantize gives it, whatever is asked for together."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

import qlora_kernels as qlk
from qlora_kernels.backends.registry import entries
from qlora_kernels.errors import ArgumentError, ArgumentTypeError, BackendError
from tests.group_checks import CPU, check_dequantize_many, mixed_weights
from tests.problems import DTYPES

BACKENDS = [entry.backend for entry in entries("dequantize_many") if not entry.available()]
Weights = list[qlk.QuantizedWeight]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return mixed_weights()


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_is_what_dequantize_gives(
    weights: Weights, backend: str, dtype: torch.dtype | None
) -> None:
    with qlk.backend(backend):
        check_dequantize_many(CPU, weights, dtype)


def test_of_nothing() -> None:
    assert qlk.dequantize_many([]) == qlk.dequantize_many([], torch.float16, []) == []


def test_what_does_not_fit_is_refused(weights: Weights) -> None:
    two = weights[:2]
    with pytest.raises(ArgumentTypeError, match="dequantize_many: weights must be a sequence of"):
        qlk.dequantize_many([*two, torch.ones(3)])  # type: ignore[list-item]
    with pytest.raises(ArgumentTypeError, match="dequantize_many: weights must be a sequence of"):
        qlk.dequantize_many(two[0])  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"dtype must be .*, got torch\.float64"):
        qlk.dequantize_many(two, torch.float64)
    with pytest.raises(ArgumentError, match="outs must be 2 tensors, one a weight, got 1"):
        qlk.dequantize_many(two, outs=[None])
    with pytest.raises(ArgumentError, match=r"outs\[1\] must be \(\(7, 9\), torch.float32"):
        qlk.dequantize_many(two, torch.float32, [None, torch.empty(9, 7)])
    with pytest.raises(ArgumentError, match=r"outs\[0\] must be .*bfloat16"):
        qlk.dequantize_many(two, torch.bfloat16, [torch.empty(33, 64), None])
    elsewhere = qlk.QuantizedWeight.empty((4, 64), torch.float32)
    with pytest.raises(ArgumentError, match=r"weights must be on one device, got \['cpu', 'meta'"):
        qlk.dequantize_many([two[0], elsewhere])


def test_a_refused_out_leaves_the_others_unwritten(weights: Weights) -> None:
    first = torch.full((33, 64), 7.0)
    with pytest.raises(ArgumentError):
        qlk.dequantize_many(weights[:2], outs=[first, torch.empty(9, 7)])
    assert (first == 7.0).all()


def test_a_forced_backend_that_cannot_is_an_error(weights: Weights) -> None:
    with qlk.backend("triton"), pytest.raises(BackendError, match="dequantize_many: the forced"):
        qlk.dequantize_many(weights[:2])


def test_opcheck(weights: Weights) -> None:
    operands = [qw.operands() for qw in weights if qw.format.plain]
    assert len(operands) >= 3
    fields = [list(field) for field in zip(*operands, strict=True)]
    fields[7] = [math.prod(weight.shape) for weight in operands]
    opcheck(torch.ops.qlora_kernels.dequantize_many.default, (*fields, torch.bfloat16))


def test_compiles_into_one_graph(weights: Weights) -> None:
    def doubled(factor: torch.Tensor) -> list[torch.Tensor]:
        return [dense * factor for dense in qlk.dequantize_many(weights, torch.float32)]

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for got, qw in zip(compiled(torch.tensor(2.0)), weights, strict=True):
        assert torch.equal(got, 2.0 * qlk.dequantize(qw, torch.float32))


def test_explain(weights: Weights) -> None:
    with qlk.backend("reference"):
        text = qlk.explain("dequantize_many", weights[0])
    assert text.startswith("dequantize_many (") and "reference        chosen" in text
