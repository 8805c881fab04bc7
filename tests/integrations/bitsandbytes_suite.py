"""Run bitsandbytes' own 4-bit tests on the ops that `patch_bitsandbytes` registers.

    python -m tests.integrations.bitsandbytes_suite CHECKOUT [--stock] [pytest options]

CHECKOUT is a clone of bitsandbytes at the installed version's tag: its wheels hold no tests. With
`--stock` the same tests run unpatched. Not part of the suite: it has some 2,600 tests of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = ("autograd", "functional", "linear4bit", "modules", "ops", "parametrize")
CASES = "4bit or linear_serialization or test_parametrize or embedding"
PATCH = "import qlora_kernels; print(qlora_kernels.patch_bitsandbytes())"
RUN = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"


def main(checkout: str, *options: str) -> int:
    """pytest's exit code."""
    source = Path(checkout) / "tests"
    found = [f"tests/test_{name}.py" for name in FILES]
    missing = [name for name in found if not (source.parent / name).exists()]
    if missing:
        sys.stderr.write(f"error: {checkout} must be a clone of bitsandbytes, with {missing[0]}\n")
        return 2
    program = RUN if "--stock" in options else f"{PATCH}; {RUN}"
    given = [option for option in options if option != "--stock"]
    with tempfile.TemporaryDirectory() as folder:
        # Without the clone's sources, which would be imported in place of the installed package.
        shutil.copytree(source, Path(folder) / "tests")
        command = [sys.executable, "-c", program, "-q", "-k", CASES, "-p", "no:cacheprovider"]
        return subprocess.run([*command, *given, *found], cwd=folder).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
