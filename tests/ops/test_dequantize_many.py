"""dequantize_many: every weight as dequantize gives it, whatever is asked for together."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

import qlora_kernels as qlk
from qlora_kernels.backends.registry import entries
from qlora_kernels.errors import ArgumentError, ArgumentTypeError, BackendError
from tests.problems import DTYPES

BACKENDS = [entry.backend for entry in entries("dequantize_many") if not entry.available()]
Weights = list[qlk.QuantizedWeight]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Formats that kernels take as they are stored and others, single and double quantization,
    ragged, of odd length, empty, of 3 and 1-D."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 64), (7, 9), (0, 64), (5, 4097), (2, 3, 5), (65,), (8, 128))
    composed = [name for name in qlk.list_formats() if not qlk.get_format(name).plain]
    made = [
        qlk.quantize(
            torch.randn(shape, generator=generator).to(DTYPES[i % 3]),
            ("nf4", "fp4", "int4")[i % 3],
            (32, 64, 128)[i % 3],
            i % 2 == 0,
        )
        for i, shape in enumerate(shapes)
    ]
    made += [qlk.quantize(torch.randn(8, 64, generator=generator), name) for name in composed[:3]]
    return made


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_is_what_dequantize_gives(
    weights: Weights, backend: str, dtype: torch.dtype | None
) -> None:
    with qlk.backend("reference"):
        expected = [qlk.dequantize(qw, dtype) for qw in weights]
    with qlk.backend(backend):
        dense = qlk.dequantize_many(weights, dtype)
    for got, wanted in zip(dense, expected, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outs_are_written_and_returned(weights: Weights, backend: str) -> None:
    def apart(rows: int, cols: int, pitch: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows, pitch), 7.0, dtype=dtype)[:, :cols]

    outs = [
        apart(33, 64, 80, torch.bfloat16),
        torch.empty(9, 7, dtype=torch.float16).T,
        torch.empty(0, 64, dtype=torch.bfloat16),
        apart(5, 4097, 4100, torch.float32),
        None,
        torch.empty(130, dtype=torch.float16)[::2],
        torch.empty(8, 128, dtype=torch.bfloat16),
    ]
    outs += [torch.empty(8, 80)[:, :64] for _ in weights[len(outs) :]]
    with qlk.backend(backend):
        dense = qlk.dequantize_many(weights, outs=outs)
    for got, out, qw in zip(dense, outs, weights, strict=True):
        assert out is None or got is out
        wanted = qw.dtype if out is None else out.dtype
        assert got.dtype == wanted and torch.equal(got, qlk.dequantize(qw, wanted))
    for out, cols in ((outs[0], 64), (outs[3], 4097)):
        assert out is not None
        assert (out.as_strided((len(out), out.stride(0)), out.stride())[:, cols:] == 7.0).all()


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
