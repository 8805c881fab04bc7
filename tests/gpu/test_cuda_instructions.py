"""On hardware: each PTX wrapper does what the manual says, and what its emulated twin does; the
kernels equal the reference when called through the runner, without torch in between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import (
    cuda_codec_checks,
    cuda_instructions,
    cuda_instructions_sm90,
    cuda_matmuls,
    cuda_wgmma,
)
from tests.emulation.cuda.runner import NVCC, Runner, build_for_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine"),
]
CHECKS = {**cuda_instructions.CHECKS, **cuda_codec_checks.CHECKS, **cuda_matmuls.CHECKS}


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """The runner, compiled for the current GPU."""
    major, minor = torch.cuda.get_device_capability()
    started = Runner(build_for_gpu(f"{major}{minor}{'a' if major in (9, 10) else ''}"))
    yield started
    started.close()


SM90_CHECKS = {**cuda_instructions_sm90.CHECKS, **cuda_wgmma.CHECKS}


@pytest.mark.parametrize("name", SM90_CHECKS)
def test_on_sm90(name: str, runner: Runner) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("instructions of sm_90a alone")
    for seed in range(3):
        SM90_CHECKS[name](runner, seed)


@pytest.mark.parametrize("name", CHECKS)
def test_on_hardware(name: str, runner: Runner) -> None:
    for seed in range(3):
        CHECKS[name](runner, seed)
