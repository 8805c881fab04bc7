"""Every CUDA source compiles for every target that ships, without register spills; needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
ARCHS = re.findall(r'"(\d+a?)"', SETUP.partition("\nCUDA_ARCHS = ")[2].partition("\n")[0])
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")


def compile_report(source: Path, arch: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles one source to a cubin; the output holds ptxas's account of each kernel."""
    assert NVCC is not None
    command = [NVCC, "-std=c++20", "-O3", "-Werror=all-warnings", "-Xptxas=-v", "-cubin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", '-DQLK_CUDA_ARCHS=""']
    command += [f"-I{ROOT / 'csrc' / 'include'}", str(source), "-o", str(folder / "out.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def spilled(report: str) -> list[str]:
    """The lines of ptxas's report that show stack or local memory in use."""
    pattern = re.compile(r"\b[1-9]\d* bytes (stack frame|spill stores|spill loads)|bytes lmem")
    return [line.strip() for line in report.splitlines() if pattern.search(line)]


@pytest.fixture(scope="module")
def known_archs() -> set[str]:
    assert NVCC is not None
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return set(re.findall(r"compute_(\d+)", listed.stdout))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_source_compiles(
    source: Path, arch: str, known_archs: set[str], tmp_path: Path
) -> None:
    if arch.rstrip("a") not in known_archs:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    done = compile_report(source, arch, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ptxas info" in done.stderr, "no ptxas report: spills would go unseen"
    assert not spilled(done.stderr)


def test_spills_are_seen(tmp_path: Path) -> None:
    """A kernel that indexes a local array at run time needs local memory, and that is reported."""
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void spilling(int* out, int n) {\n"
        "  int values[64];\n"
        "  for (int i = 0; i < 64; ++i) values[(i * n) & 63] = out[i] * n;\n"
        "  *out = values[n & 63];\n"
        "}\n"
    )
    done = compile_report(source, "80", tmp_path)
    assert done.returncode == 0, done.stderr
    assert spilled(done.stderr)


def test_broken_source_fails(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { undeclared = 1; }\n")
    assert compile_report(source, "80", tmp_path).returncode != 0
