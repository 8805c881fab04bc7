"""Run bitsandbytes' own tests of the ops that `patch_bitsandbytes` registers.

    python -m tests.integrations.bitsandbytes_suite CHECKOUT [--stock] [pytest options]

CHECKOUT is a clone of bitsandbytes at the installed version's tag: its wheels hold no tests. With
`--stock` the same tests run unpatched. Those of the optimizers need lion-pytorch, and are left out
without it. Not part of the suite: it has some 3,000 tests of its own.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = ("autograd", "functional", "linear4bit", "modules", "ops", "parametrize", "optim")
CASES = (
    "4bit or linear_serialization or test_parametrize or embedding "
    "or blockwise or few_bit or fp8_quant or optim"
)
MARKS = "not slow and not benchmark and not deprecated"  # as the clone's own settings
PATCH = "import qlora_kernels; print(qlora_kernels.patch_bitsandbytes())"
RUN = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"


def main(checkout: str, *options: str) -> int:
    """pytest's exit code."""
    source = Path(checkout) / "tests"
    names = [name for name in FILES if name != "optim" or importlib.util.find_spec("lion_pytorch")]
    found = [f"tests/test_{name}.py" for name in names]
    missing = [name for name in found if not (source.parent / name).exists()]
    if missing:
        sys.stderr.write(f"error: {checkout} must be a clone of bitsandbytes, with {missing[0]}\n")
        return 2
    # As a plug-in, the patch is there in the processes of pytest-xdist too.
    patched = [] if "--stock" in options else ["-p", "patched"]
    given = [option for option in options if option != "--stock"]
    with tempfile.TemporaryDirectory() as folder:
        # Without the clone's sources, which would be imported in place of the installed package.
        shutil.copytree(source, Path(folder) / "tests")
        (Path(folder) / "patched.py").write_text(f"{PATCH}\n", encoding="utf-8")
        command = [sys.executable, "-c", RUN, "-q", "-k", CASES, "-m", MARKS, *patched]
        command += ["-p", "no:cacheprovider"]
        return subprocess.run([*command, *given, *found], cwd=folder).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
