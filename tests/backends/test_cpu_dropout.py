"""dropout on the CPU equals the reference bit for bit, at every level."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_kernels.backends.cpu.dropout import dropout_cpu
from qlora_kernels.reference import dropout_reference
from qlora_kernels.testing.errors import assert_bitwise_equal
from qlora_kernels.testing.shapes import CODEC_NUMELS
from tests.problems import DTYPES

pytestmark = pytest.mark.usefixtures("poisoned")

SEEDS = (0, 1, -1, -(2**63), 2**63 - 1, 0x123456789ABCDEF)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [2.0**-32, 2.0**-33, 0.1, 0.5, 0.999, 1.0])
def test_dropout_equals_reference(isa: int, dropout_p: float, dtype: torch.dtype) -> None:
    for i, numel in enumerate(CODEC_NUMELS):
        seed = torch.tensor([SEEDS[i % len(SEEDS)]])
        x = torch.randn(numel).to(dtype)
        expected = dropout_reference(x, dropout_p, seed)
        assert_bitwise_equal(dropout_cpu(isa, x, dropout_p, seed), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_of_every_seed(isa: int, seed: int) -> None:
    x = torch.ones(3, 1111)
    expected = dropout_reference(x, 0.25, torch.tensor([seed]))
    assert_bitwise_equal(dropout_cpu(isa, x, 0.25, torch.tensor([seed])), expected)
    other = dropout_cpu(isa, x, 0.25, torch.tensor([seed ^ 1]))
    assert 0.3 < (other != expected).float().mean() < 0.45  # 2 · 1/4 · 3/4 = 0.375


def test_dropout_without_a_seed_or_a_chance_is_x_itself(isa: int) -> None:
    x = torch.randn(100)
    assert dropout_cpu(isa, x, 0.0, torch.tensor([3])) is x
    assert dropout_cpu(isa, x, 0.5, None) is x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_elements_are_zero_whatever_they_were(isa: int, dtype: torch.dtype) -> None:
    seed = torch.tensor([42])
    for value in (math.nan, math.inf, -math.inf, torch.finfo(dtype).max):
        x = torch.full((2000,), value, dtype=dtype)
        y = dropout_cpu(isa, x, 0.5, seed)
        assert_bitwise_equal(y, dropout_reference(x, 0.5, seed))
        assert 900 < (y == 0).sum() < 1100
        assert not dropout_cpu(isa, x, 1.0, seed).any()


def test_dropout_does_not_depend_on_the_threads(
    isa: int, one_thread_then_two: tuple[int, int]
) -> None:
    x, seed = torch.randn(300_001), torch.tensor([5])
    results = []
    for threads in one_thread_then_two:
        torch.set_num_threads(threads)
        results.append(dropout_cpu(isa, x, 0.1, seed))
    assert_bitwise_equal(*results)
    assert_bitwise_equal(results[0], dropout_reference(x, 0.1, seed))


def test_binding_rejects_what_would_corrupt_memory(isa: int) -> None:
    with pytest.raises(RuntimeError, match="seed must have 1 elements, got 2"):
        dropout_cpu(isa, torch.randn(8), 0.5, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="seed must be Long"):
        dropout_cpu(isa, torch.randn(8), 0.5, torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        dropout_cpu(isa, torch.randn(8).double(), 0.5, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        dropout_cpu(isa, torch.randn(8, 8).t(), 0.5, torch.tensor([1]))
