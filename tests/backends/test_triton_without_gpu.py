"""Without a GPU the Triton kernels say why they cannot run, and nothing imports triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import qlora_kernels as qlk
from qlora_kernels import env
from qlora_kernels.backends.registry import OPS, Problem, entries, explain_problem, select
from qlora_kernels.errors import BackendError

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or env.triton_interpret(), reason="the kernels can run here"
)


@pytest.mark.parametrize("op", OPS)
def test_cpu_tensors_are_rejected_with_a_reason(op: str) -> None:
    problem = Problem(op, "cpu", torch.float32, 4, 64, 64, 4)
    entry = next(entry for entry in entries(op) if entry.backend == "triton")
    assert entry.rejects(problem) == "device must be cuda, got cpu"
    assert select(problem).backend != "triton"
    with qlk.backend("triton"), pytest.raises(BackendError, match=r"CUDA device|triton"):
        select(problem)
    assert "passed over" in explain_problem(problem)


def test_a_cuda_problem_falls_through_to_the_reference() -> None:
    problem = Problem("dequantize", "cuda", torch.bfloat16, in_features=64)
    assert select(problem).backend == "reference"


def test_launchers_do_not_import_triton() -> None:
    probe = (
        "import sys, torch; before = 'triton' in sys.modules;"
        "import qlora_kernels.backends.triton.qlora_linear;"
        "assert ('triton' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
