"""Tests that need a CUDA device: `pytest -m gpu`. Skipped where torch sees none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS wants it said before it starts, or refuses what `poisoned` asks for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> torch.device:
    """The CUDA device, or a skip."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors are NaN, so that an element which is never written fails the comparison."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
