"""The Hopper matmul in CUDA, emulated: as accurate as torch's own, in every order of the threads
and copies, with no access outside a buffer and no race."""

from __future__ import annotations

import pytest

from tests.cuda_wgmma import CHECKS
from tests.emulation.cuda.runner import Runner


@pytest.mark.parametrize("name", CHECKS)
def test_wgmma(name: str, runner: Runner, seeds: range) -> None:
    for seed in seeds:
        CHECKS[name](runner, seed)
