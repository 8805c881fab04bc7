"""Libraries of their own from changed copies of csrc, and pytest runs against them.

A library is the last build of this tree with some kernels compiled anew: from a source that was
changed on purpose (tests/can_fail), or for a machine that has no AMX (tests/emulation/amx), where
QLK_EMULATE_AMX puts the plain C++ twin of the tile unit in place of its instructions and
QLK_ASSUME_ISA raises the level that the library reports.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from tests.pytest_server import run_pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TWIN_INCLUDE = ROOT / "tests" / "emulation" / "amx" / "include"
LINK_COMMAND = ROOT / "build" / "native" / "link.txt"

# As setup.py compiles.
_FLAGS = ["-std=c++20", "-fPIC", "-fno-math-errno", "-ffp-contract=off"]
# -O1 halves the time and changes no result.
FAST_TO_COMPILE = [*_FLAGS, "-O1"]
# 4 is Isa::kAmx. -O3 vectorizes the twin.
EMULATED_AMX = [*_FLAGS, "-O3", "-DQLK_EMULATE_AMX", "-DQLK_ASSUME_ISA=4", f"-I{TWIN_INCLUDE}"]
EMULATED_SOURCES = (
    "isa.cpp",
    "low_rank_amx.cpp",
    "quantized_matmul_amx.cpp",
    "quantized_matmul_backward_amx.cpp",
)

# The instructions of the level below AMX that the AMX kernels use as well.
_PROBE = """
#include "qlk/decode_span.h"
QLK_AVX512_BF16 int run(const uint8_t* bytes) {
  const __m512i table = qlk::bf16_table(_mm512_set1_ps(1.0f), 1.0f);
  const __m512i words = _mm512_permutexvar_epi16(qlk::code_words(bytes), table);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(words)) == 0x3f803f80 ? 0 : 1;
}
int main(int argc, char**) {
  uint8_t bytes[16] = {};
  bytes[0] = static_cast<uint8_t>(argc);
  return run(bytes);
}
"""


def why_no_source_build() -> str | None:
    """Why no library can be built here, or None."""
    return None if LINK_COMMAND.exists() else "needs the objects of a build here (`make build`)"


@functools.cache
def why_no_emulated_amx() -> str | None:
    """Why the AMX kernels cannot run here on the twin of the tile unit, or None.

    Some hypervisors hide the AVX512_BF16 bit of CPUID and let its instructions through, so they are
    tried, in a process that may die of it.
    """
    if why_no_source_build():
        return why_no_source_build()
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "probe.cpp", Path(folder) / "probe"
        source.write_text(_PROBE)
        run([*compiler(), *_FLAGS, "-O1", f"-I{CSRC / 'include'}", str(source), "-o", str(program)])
        status = subprocess.run([program], check=False).returncode
    if status == -signal.SIGILL:
        return "this machine does not execute the AVX512_BF16 instructions that surround AMX's"
    assert status == 0, f"the AVX512_BF16 instructions gave a wrong result (status {status})"
    return None


@functools.cache
def setup_file() -> ModuleType:
    """setup.py, imported without setting anything up."""
    spec = importlib.util.spec_from_file_location("setup_file", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up there.
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


@functools.cache
def _build_units() -> list[Any]:
    """What `make build` compiles, with warnings as errors and without."""
    module, units = setup_file(), []
    cxx, nvcc = module.find_cxx(), module.find_nvcc()
    for werror in ("1", "0") if cxx and nvcc else ():
        with mock.patch.dict(os.environ, QLK_BUILD_WERROR=werror):
            units += module.compile_units(cxx, nvcc)
    return units


def built_object(source: Path, arch: str) -> Path | None:
    """What `make build` made of a CUDA source as it is now, with code for e.g. "90a", and beside it
    a .log of what the compilers said; or None."""
    for unit in _build_units():
        if unit.source == source and any(word.endswith(f"=sm_{arch}") for word in unit.command):
            made: Path = unit.object
            if unit.is_current() and made.with_suffix(".log").exists():
                return made
    return None


def compiler() -> list[str]:
    """The C++ compiler as a command."""
    return shlex.split(os.environ.get("CXX", "c++"))


def run(command: Sequence[str]) -> None:
    """Runs a compiler or linker; its output is the message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def compile_kernel(source: str, csrc: Path, flags: Sequence[str], folder: Path) -> Path:
    """The object of a source of csrc/kernels_cpu or csrc/bindings, in `folder`."""
    made = folder / f"{source}.o"
    path = csrc / source_folder(source) / source
    include = [f"-I{csrc / 'include'}"]
    if source_folder(source) == "bindings":
        setup = setup_file()
        include += ["-isystem", str(setup.torch_root() / "include")]
        include += [f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET_VERSION}"]
    run([*compiler(), *flags, *include, "-c", str(path), "-o", str(made)])
    return made


def source_folder(source: str) -> str:
    """Bindings are named after the device and the op."""
    return "bindings" if source.startswith("cpu_") else "kernels_cpu"


def link(objects: Mapping[str, Path], library: Path) -> Path:
    """The last build's library with the objects of some sources replaced."""
    words = shlex.split(LINK_COMMAND.read_text())
    for source, made in objects.items():
        stem = f"{source_folder(source)}-{source}-"
        replaced = [str(made) if Path(word).name.startswith(stem) else word for word in words]
        assert replaced != words, f"the last build has no object of {source}: run `make build`"
        words = replaced
    run([*words, "-o", str(library)])
    return library


def run_tests(library: Path, selected: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """pytest on `selected` (arguments) in a process that loads `library`; it stops at a failure."""
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *selected]
    return run_pytest(arguments, {"QLK_LIBRARY": str(library)})
