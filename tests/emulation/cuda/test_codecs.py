"""quantize, double_quantize and dequantize in CUDA, emulated: bit for bit, in every order of the
threads, with no access outside a buffer and no race."""

from __future__ import annotations

import pytest

from tests.cuda_codec_checks import CHECKS
from tests.emulation.cuda.runner import Runner


@pytest.mark.parametrize("name", CHECKS)
def test_codec(name: str, runner: Runner, seeds: range) -> None:
    for seed in seeds:
        CHECKS[name](runner, seed)
