"""The kernels of the levels that this machine does not show run on the twin of the AMX tile unit.

They are compiled into a library of their own, which reports the AMX level, and take the same tests
as on a machine that has it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora_kernels.backends.cpu.common import ISA_NAMES, machine_isa
from tests.native_library import (
    CSRC,
    EMULATED_AMX,
    EMULATED_SOURCES,
    ROOT,
    compile_kernel,
    link,
    run_tests,
    why_no_emulated_amx,
)

TESTS = sorted(str(path) for path in (ROOT / "tests" / "backends").glob("test_cpu_*.py"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library on the twin."""
    if machine_isa() == ISA_NAMES.index("amx"):
        pytest.skip("this machine has AMX: the tests themselves run on it")
    if reason := why_no_emulated_amx():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("emulated")
    objects = {name: compile_kernel(name, CSRC, EMULATED_AMX, folder) for name in EMULATED_SOURCES}
    return link(objects, folder / "libemulated.so")


@pytest.mark.slow
@pytest.mark.parametrize("level", ["avx512_bf16", "amx"])
def test_kernels_pass_their_tests_on_the_twin(library: Path, level: str) -> None:
    done = run_tests(library, [*TESTS, "-k", f"[{level}- or [{level}]"])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d{3,} passed", done.stdout.splitlines()[-1]), done.stdout[-4000:]
    # The reasons for skips are printed; that the level is missing must not be among them.
    assert "this machine has no" not in done.stdout, done.stdout[-4000:]
