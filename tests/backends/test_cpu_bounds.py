"""The CPU matmuls touch nothing beside their operands, at every level."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.guarded import Guard

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_kernels_stay_within_their_operands(isa: int) -> None:
    done = run_python("-m", "tests.guarded", str(isa))
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    assert "survived 600 problems" in done.stdout


def test_guarded_tensors_hold_their_values() -> None:
    for at_end in (True, False):
        guard = Guard(at_end)
        for size in (1, 3, 4096, 5000):
            tensor = torch.arange(size, dtype=torch.int32)
            assert torch.equal(guard.copy(tensor), tensor)
        guard.release()


def test_a_byte_beside_a_guarded_tensor_is_fatal() -> None:
    for at_end, beside, inside in ((True, "t.nbytes", "t.nbytes - 1"), (False, "-1", "0")):
        code = (
            "import ctypes, torch\nfrom tests.guarded import Guard\n"
            f"t = Guard({at_end}).copy(torch.ones(5, dtype=torch.uint8))\n"
            f"print(ctypes.string_at(t.data_ptr() + {inside}, 1), flush=True)\n"
            f"ctypes.string_at(t.data_ptr() + {beside}, 1)\n"
        )
        done = run_python("-c", code)
        assert done.returncode == -signal.SIGSEGV and done.stdout == "b'\\x01'\n", done.stderr
