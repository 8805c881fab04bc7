"""Every test of a kernel runs on each instruction-set path that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qlora_kernels.backends.cpu.common import ISA_NAMES, why_unavailable


@pytest.fixture(params=range(len(ISA_NAMES)), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> int:
    """An index into ISA_NAMES; the test is skipped where the machine lacks that level."""
    reason = why_unavailable(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors are NaN, so that an element which is never written fails the comparison."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all(), "this torch does not fill fresh tensors"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread_then_two() -> Iterator[tuple[int, int]]:
    """The thread counts to compare; torch's own is put back afterwards."""
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)
