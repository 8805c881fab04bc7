"""Emulated runners, one per mode and session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.emulation.cuda.runner import (
    MODES,
    KernelStopped,
    Runner,
    build_emulated,
    start,
    why_no_emulation,
)

# Orders of the threads that each problem runs in, by mode; 0 is in order. TSAN sees a race in any.
SEEDS = {"plain": range(4), "memory": range(1, 2), "races": range(2, 3)}


@pytest.fixture(scope="session", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """A key of MODES."""
    return request.param


@pytest.fixture(scope="session")
def runner(mode: str) -> Iterator[Runner]:
    """The kernels of this tree, emulated in `mode`; leaks are reported at the end."""
    reason = why_no_emulation()
    if reason:
        pytest.skip(reason)
    started = start(mode, build_emulated(mode))
    yield started
    try:
        started.close()
    except KernelStopped as error:
        pytest.fail(str(error))


@pytest.fixture
def seeds(mode: str) -> range:
    """The orders to run a problem in."""
    return SEEDS[mode]
