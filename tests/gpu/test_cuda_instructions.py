"""On hardware: each PTX wrapper does what the manual says, and what its emulated twin does; the
kernels equal the reference when called through the runner, without torch in between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import cuda_codec_checks, cuda_instructions, cuda_matmuls
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


@pytest.mark.parametrize("name", CHECKS)
def test_on_hardware(name: str, runner: Runner) -> None:
    for seed in range(3):
        CHECKS[name](runner, seed)
