"""The figures are what their names say, and the published ones where there are any."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_kernels import Codebook, Format, dequantize, get_format, quantize
from qlora_kernels.errors import ArgumentError
from qlora_kernels.formats.packing import unpack
from qlora_kernels.lab.metrics import Sums, add, decibels, entropy, fidelity, measure
from qlora_kernels.lab.weights import weight_set
from tests.lab.running import matrix


@pytest.mark.parametrize("shape", [(24, 96), (7, 33), (1, 1), (3, 100_003)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_plain_sums(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """One tensor goes through several slices, one has an odd number of weights."""
    weight = matrix(3, *shape).to(dtype) if shape != (1, 1) else torch.ones(1, 1, dtype=dtype)
    sums, dense = measure(weight, get_format("nf4"))
    qw = quantize(weight, "nf4")
    assert torch.equal(dense, dequantize(qw, torch.float32))
    error = (dense - weight.float()).double()
    assert sums.error_sq == pytest.approx(float(error.square().sum()), rel=1e-12)
    assert sums.weight_sq == pytest.approx(float(weight.double().square().sum()), rel=1e-12)
    assert sums.max_error == float(error.abs().max())
    assert (sums.numel, sums.nbytes) == (weight.numel(), qw.nbytes)
    codes = unpack(qw.codes, qw.numel)
    assert sums.code_counts == tuple(int((codes == code).sum()) for code in range(16))


def test_measuring_changes_nothing() -> None:
    weight = matrix(1)
    kept = weight.clone()
    measure(weight, get_format("nf4"))
    assert torch.equal(weight, kept)


def test_sums_add_up_to_those_of_the_whole() -> None:
    """Halves that end at a block's end are quantized as the whole is."""
    fmt = get_format("nf4").override(block_size=32, double_quant=False)
    weight = matrix(2, 64, 64)
    parts = [measure(half, fmt)[0] for half in weight.split(32)]
    whole, _ = measure(weight, fmt)
    added = add(parts)
    assert added.code_counts == whole.code_counts
    assert (added.numel, added.nbytes) == (whole.numel, whole.nbytes)
    assert added.max_error == whole.max_error
    assert added.error_sq == pytest.approx(whole.error_sq, rel=1e-12)
    figures = fidelity(added, "x")
    assert figures.bits == 8 * whole.nbytes / whole.numel
    assert figures.nmse_db == pytest.approx(20 * math.log10(figures.relative_error))


# Gauss, block size 64, fp32 scales: the errors of 2^24 samples, with the QLoRA paper's tables.
@pytest.mark.parametrize(
    ("name", "published"), [("nf4", -20.73), ("fp4", -18.28), ("int4", -19.36)]
)
def test_gaussian_error_is_the_published_one(name: str, published: float) -> None:
    gauss = weight_set("gauss", 1 << 20, seed=0).sources[0].load()
    sums, _ = measure(gauss, get_format(name).override(64, double_quant=False))
    assert fidelity(sums, "gauss").nmse_db == pytest.approx(published, abs=0.02)


def test_entropy() -> None:
    assert entropy([1] * 16) == 4
    assert entropy([0, 9, 0]) == 0
    assert entropy([1, 1, 2]) == 1.5


def test_no_error_is_a_number() -> None:
    """JSON has no infinity."""
    assert decibels(0.0) == -999
    ones, _ = measure(torch.ones(4, 64), get_format("nf4").override(double_quant=False))
    assert fidelity(ones, "ones").nmse_db == -999


def test_zeros_have_no_relative_error() -> None:
    zeros, _ = measure(torch.zeros(4, 64), get_format("nf4"))
    with pytest.raises(ArgumentError, match="not all 0, got those of zeros"):
        fidelity(zeros, "zeros")


def test_sums_survive_json() -> None:
    sums, _ = measure(matrix(5), get_format("int4"))
    assert Sums.from_json(sums.to_json()) == sums


@pytest.mark.parametrize("values", [[-1, -0.6, -0.3, 0, 0.3, 0.6, 1], [-1, 0, 0.4, 1]], ids=len)
@pytest.mark.parametrize("shape", [(5, 31), (6, 32)], ids=str)
def test_dense_packings_are_counted(values: list[float], shape: tuple[int, int]) -> None:
    """Codes of fewer bits are those of the same table in the 4-bit container."""
    dense = Format("dense", Codebook("table", values), pack="dense")
    wide = Format("wide", Codebook("table", values))
    counts = [measure(matrix(4, *shape), fmt)[0].code_counts for fmt in (dense, wide)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) == shape[0] * shape[1]
    assert min(counts[0][: len(values)]) > 0
