"""Runs the tests of `interpreter/` in a process of their own: Triton decides on import whether its
kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kernels import env

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((Path(__file__).parent / "interpreter").glob("test_*.py"))

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="this is the interpreter's process")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_in_interpreter() -> None:
    assert len(FILES) >= 3
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, FILES)]
    variables = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
