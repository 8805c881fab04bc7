"""Collected only where TRITON_INTERPRET=1 is set; `test_in_interpreter.py` sees to that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qlora_kernels import env

collect_ignore_glob = [] if env.triton_interpret() else ["test_*.py"]


# Tiles are too small for more threads, which would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh tensors are NaN, so that an element which is never written fails the comparison."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all(), "this torch does not fill fresh tensors"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """Where the shared checks run."""
    return torch.device("cpu")
