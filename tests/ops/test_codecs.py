"""quantize, double_quantize, dequantize: results, checks, contracts with torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

import qlora_kernels as qlk
from qlora_kernels.errors import ArgumentError, ArgumentTypeError, BackendError

SHAPES = [(0, 64), (1,), (7, 9), (33, 65), (3, 4097), (2, 3, 5)]


@pytest.mark.parametrize("name", qlk.list_formats())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_backends_agree_bit_for_bit(name: str, shape: tuple[int, ...], nested: bool) -> None:
    weight = torch.randn(shape)
    with qlk.backend("reference"):
        expected = qlk.quantize(weight, name, 32, nested)
        dense = qlk.dequantize(expected)
    got = qlk.quantize(weight, name, 32, nested)
    for field, tensor in expected.tensors().items():
        assert torch.equal(getattr(got, field), tensor), field
    assert torch.equal(qlk.dequantize(got), dense) and dense.shape == shape


def test_a_value_of_the_table_comes_back_exactly() -> None:
    table = torch.tensor(qlk.get_format("nf4").codebook.values)
    weight = table.repeat(4) * 0.375
    assert torch.equal(qlk.dequantize(qlk.quantize(weight, double_quant=False)), weight)


def test_encoding_against_the_decoded_scale_is_never_worse() -> None:
    import dataclasses

    nf4 = qlk.get_format("nf4")
    decoded = dataclasses.replace(nf4, name="nf4_decoded", encode_against="decoded")
    weight = torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None]
    errors = []
    for fmt in (decoded, nf4):
        qw = qlk.quantize(weight, fmt)
        errors.append((qlk.dequantize(qw).double() - weight).abs())
    assert (errors[0] <= errors[1]).all() and (errors[0] < errors[1]).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_non_finite_weights_are_refused_with_count_and_index(bad: float) -> None:
    weight = torch.zeros(4, 64)
    weight[1, 2] = weight[3, 3] = bad
    with pytest.raises(ArgumentError, match=r"2 other values, the first .* at flat index 66"):
        qlk.quantize(weight)


def test_unchecked_nan_never_becomes_a_plausible_number() -> None:
    weight = torch.randn(4, 64)
    weight[1, 2] = math.nan
    plain = qlk.dequantize(qlk.quantize(weight, double_quant=False, check_finite=False))
    assert plain[1].isnan().all() and plain[[0, 2, 3]].isfinite().all()
    nested = qlk.dequantize(qlk.quantize(weight, double_quant=True, check_finite=False))
    assert nested.isnan().all()


def test_bits_per_parameter_counts_real_bytes() -> None:
    weight = torch.randn(1024, 1024)
    assert qlk.quantize(weight, double_quant=False).bits_per_parameter == 4.5
    assert abs(qlk.quantize(weight).bits_per_parameter - 4.127) < 1e-3


def test_out_is_written_whatever_its_strides() -> None:
    qw = qlk.quantize(torch.randn(33, 65))
    expected = qlk.dequantize(qw)
    for out in (torch.empty(33, 65), torch.empty(65, 33).T, torch.empty(33, 80)[:, :65]):
        assert qlk.dequantize(qw, out=out) is out and torch.equal(out, expected)
    with pytest.raises(ArgumentError, match="out must be"):
        qlk.dequantize(qw, out=torch.empty(65, 33))


def test_wrong_dtypes_are_named() -> None:
    with pytest.raises(ArgumentTypeError, match=r"got torch\.float64"):
        qlk.quantize(torch.randn(4, dtype=torch.float64))
    with pytest.raises(ArgumentTypeError, match="a tensor, got list"):
        qlk.quantize([1.0])  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="absmax must be a float32 tensor"):
        qlk.double_quantize(torch.ones(4, dtype=torch.float16))


def test_a_forced_backend_that_cannot_is_an_error_with_the_reason() -> None:
    with pytest.raises(ArgumentError, match="backend: name must be"), qlk.backend("cuda:none"):
        pass
    operands = qlk.quantize(torch.randn(64, 64)).operands()
    with qlk.backend("cpu"), pytest.raises(BackendError, match="dtype must be one of"):
        torch.ops.qlora_kernels.dequantize(*operands, torch.float64)


def test_explain_names_the_chosen_kernel() -> None:
    qw = qlk.quantize(torch.randn(64, 64))
    with qlk.backend("reference"):
        text = qlk.explain("dequantize", qw)
    assert "reference        chosen" in text
    assert text.count("chosen") == 1


def test_opcheck() -> None:
    codebook = qlk.get_format("nf4").codebook
    boundaries = torch.tensor(codebook.encoder.boundaries)
    ranks = torch.tensor(codebook.encoder.rank_codes, dtype=torch.uint8)
    ops = torch.ops.qlora_kernels
    opcheck(ops.quantize.default, (torch.randn(33, 65), boundaries, ranks, 7, 64))
    qw = qlk.quantize(torch.randn(33, 65))
    operands = qw.operands()
    opcheck(ops.dequantize.default, (*operands, torch.bfloat16))
    scales = torch.rand(300)
    opcheck(ops.double_quantize.default, (scales, operands.scale_codebook, 256))
