"""Every test of a kernel runs on each instruction-set path that this machine has."""

from __future__ import annotations

import pytest

from qlora_kernels.backends.cpu.common import ISA_NAMES, why_unavailable


@pytest.fixture(params=range(len(ISA_NAMES)), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> int:
    """An index into ISA_NAMES; the test is skipped where the machine lacks that level."""
    reason = why_unavailable(request.param)
    if reason:
        pytest.skip(reason)
    return request.param
