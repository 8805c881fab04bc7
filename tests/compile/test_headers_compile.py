"""Every header in csrc/include compiles alone, without torch, on a plain C++20 compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
HEADERS = sorted(INCLUDE.rglob("*.h"))
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler on this machine")


def compile_alone(header: str, include: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Through a one-line source: a header compiled directly warns about its own #pragma once."""
    assert CXX is not None
    source = folder / "alone.cpp"
    source.write_text(f'#include "{header}"\n')
    command = [CXX, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{include}"]
    return subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.stem)
def test_header_compiles_alone(header: Path, tmp_path: Path) -> None:
    done = compile_alone(header.relative_to(INCLUDE).as_posix(), INCLUDE, tmp_path)
    assert done.returncode == 0, done.stderr


def test_incomplete_header_fails(tmp_path: Path) -> None:
    (tmp_path / "incomplete.h").write_text("#pragma once\ninline int64_t size(std::string s);\n")
    assert compile_alone("incomplete.h", tmp_path, tmp_path).returncode != 0
