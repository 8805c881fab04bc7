"""dequantize_many: several weights at once, in one launch where the backend can.

torch.ops.qlora_kernels.dequantize_many takes the weights field by field, each a list, and returns
them flat: a schema has no list of shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from qlora_kernels.backends.registry import Problem, select
from qlora_kernels.errors import argument_error, type_error
from qlora_kernels.formats.operands import WeightOperands
from qlora_kernels.formats.quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from qlora_kernels.ops.checks import DTYPE_RULE
from qlora_kernels.ops.codecs import dequantize
from qlora_kernels.ops.library import define

_OP = "dequantize_many"
_SHAPE = WeightOperands._fields.index("shape")


def dequantize_many_problem(operands: Sequence[WeightOperands], dtype: torch.dtype) -> Problem:
    """What the choice of a kernel sees of one or more weights: all their elements, the smallest
    block size, whether any is double-quantized."""
    return Problem(
        _OP,
        operands[0].codes.device.type,
        dtype,
        in_features=sum(math.prod(weight.shape) for weight in operands),
        block_size=min(weight.block_size for weight in operands),
        double_quant=any(weight.absmax is None for weight in operands),
    )


def run_dequantize_many(
    operands: Sequence[WeightOperands],
    dtype: torch.dtype,
    outs: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Pick a kernel for one or more weights and run it, into `outs` where given."""
    kernel = select(dequantize_many_problem(operands, dtype)).fn
    results: list[torch.Tensor] = kernel(operands, dtype, outs)
    return results


def _fake(codes: list[torch.Tensor], *rest: Any) -> list[torch.Tensor]:
    numels, dtype = rest[_SHAPE - 1], rest[-1]
    return [one.new_empty(numel, dtype=dtype) for one, numel in zip(codes, numels, strict=True)]


@define(
    f"{_OP}(Tensor[] codes, Tensor?[] absmax, Tensor?[] scale_codes, Tensor?[] scale_absmax, "
    "Tensor?[] scale_offset, Tensor[] codebook, Tensor?[] scale_codebook, SymInt[] numel, "
    "int[] block_size, int[] scale_block_size, ScalarType dtype) -> Tensor[]",
    _fake,
)
def _dequantize_many(*arguments: Any) -> list[torch.Tensor]:
    *fields, dtype = arguments
    fields[_SHAPE] = [(numel,) for numel in fields[_SHAPE]]
    operands = [WeightOperands(*weight) for weight in zip(*fields, strict=True)]
    return run_dequantize_many(operands, dtype, [None] * len(operands))


def dequantize_many(
    weights: Sequence[QuantizedWeight],
    dtype: torch.dtype | None = None,
    outs: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """Several dense weights at once, each exactly as `dequantize` gives it.

    On a GPU, weights that are stored alike take one launch together: a layer's q, k and v cost the
    launch of one. Weights of formats that are no `Format.plain` are dequantized on their own.

    Args:
        weights: quantized weights of one device and any shapes, formats and block sizes.
        dtype: fp32, fp16 or bf16 for all; None: that of the given out, else the weight's own.
        outs: tensors to write and return, one a weight (None: a fresh one), of the weight's shape
            and device and `dtype`. Rows may be apart (a pitch); they must not overlap.

    Raises:
        ArgumentTypeError: not a sequence of QuantizedWeights, another dtype.
        ArgumentError: several devices, an out that does not fit, another number of outs.
    """
    if not isinstance(weights, Sequence) or not all(
        isinstance(qw, QuantizedWeight) for qw in weights
    ):
        named = {type(qw).__name__ for qw in weights} if isinstance(weights, Sequence) else weights
        raise type_error(_OP, "weights", "a sequence of QuantizedWeights", named)
    given = [None] * len(weights) if outs is None else list(outs)
    if len(given) != len(weights):
        raise argument_error(_OP, "outs", f"{len(weights)} tensors, one a weight", len(given))
    devices = {qw.device for qw in weights}
    if len(devices) > 1:
        raise argument_error(_OP, "weights", "on one device", sorted(map(str, devices)))
    wanted = [
        dtype or (qw.dtype if out is None else out.dtype)
        for qw, out in zip(weights, given, strict=True)
    ]
    for index, (qw, out) in enumerate(zip(weights, given, strict=True)):
        _check(index, qw, wanted[index], out)
    results: list[Any] = [None] * len(weights)
    by_dtype: dict[torch.dtype, dict[int, WeightOperands]] = {}
    for index, qw in enumerate(weights):
        operands = qw.operands()
        if isinstance(operands, WeightOperands):
            by_dtype.setdefault(wanted[index], {})[index] = operands
        else:
            results[index] = dequantize(qw, wanted[index], given[index])
    for same, together in by_dtype.items():
        chosen = [given[index] for index in together]
        if all(out is None for out in chosen):
            flat = _flat(list(together.values()), same)
            dense = [one.view(weights[i].shape) for i, one in zip(together, flat, strict=True)]
        else:
            dense = run_dequantize_many(list(together.values()), same, chosen)
        for index, one in zip(together, dense, strict=True):
            results[index] = one
    return results


def _check(index: int, qw: QuantizedWeight, dtype: torch.dtype, out: torch.Tensor | None) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise type_error(_OP, "dtype", DTYPE_RULE, repr(dtype))
    if out is None:
        return
    wanted = (qw.shape, dtype, qw.device)
    got = (tuple(out.shape), out.dtype, out.device)
    if got != wanted:
        raise argument_error(_OP, f"outs[{index}]", f"{wanted}", got)


def _flat(operands: list[WeightOperands], dtype: torch.dtype) -> list[torch.Tensor]:
    """The torch op, which torch.compile sees."""
    fields: list[list[Any]] = [list(field) for field in zip(*operands, strict=True)]
    fields[_SHAPE] = [math.prod(weight.shape) for weight in operands]
    dense: list[torch.Tensor] = torch.ops.qlora_kernels.dequantize_many(*fields, dtype)
    return dense
