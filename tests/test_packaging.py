"""The package as users get it: a wheel in a second venv, an editable install, no compiler at all.

The second environments see this one's torch through a path file instead of installing it again;
nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("qlora_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")

ROUND_TRIP = """
import torch, qlora_kernels as qlk
weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
quantized = qlk.quantize(weight, format="nf4", double_quant=True)
restored = qlk.dequantize(quantized, dtype=torch.float32)
with qlk.backend("reference"):
    expected = qlk.dequantize(quantized, dtype=torch.float32)
assert torch.equal(restored, expected)
assert (restored - weight).abs().max() < 0.3 * weight.abs().max()
print(qlk.__file__)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("packaging"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds are for Linux"),
]


def run(
    command: list[str], cwd: Path, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    hidden = ("QLK_", "PYTHONPATH", "CXX", "CUDA_HOME", "NVCC")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, "QLK_BUILD_CUDA": "0", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def copy_sources(folder: Path) -> Path:
    """The files a clone has, without what builds left among them."""
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_not_built.txt")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, source / name)
    return source


def make_environment(folder: Path) -> Path:
    """A venv that holds nothing itself and finds torch here; returns its interpreter."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # A plain path line: path files in there, such as this package's own editable one, stay unread.
    (Path(purelib) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python: Path, *arguments: str, cwd: Path, check: bool = True, **variables: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", f"--python={python}"]
    done = run([*command, *arguments], cwd, check, **variables)
    return done.stdout if check else f"{done.returncode}\n{done.stdout}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    output = source.parent / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run([*command, "-w", str(output), str(source)], source.parent)
    (built,) = output.glob("*.whl")
    return built


def test_wheel_depends_on_no_python_version(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("qlora_kernels/libqlora_kernels.so")
    assert b"PyInit_" not in library
    assert b"libpython" not in library


def test_wheel_holds_every_package_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("qlora_kernels/")}
    ignored = ("__pycache__", "_not_built.txt", "libqlora_kernels.so")
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "qlora_kernels").rglob("*")
        if path.is_file() and not any(part in ignored for part in path.parts)
    }
    assert packed == expected | {"qlora_kernels/libqlora_kernels.so"}


def test_wheel_works_in_a_second_environment(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "second")
    pip(python, "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    done = run([str(python), "-c", ROUND_TRIP], tmp_path)
    assert done.stdout.strip().startswith(str(tmp_path / "second"))
    info = run([str(python), "-m", "qlora_kernels", "info"], tmp_path).stdout
    assert f"native library: {tmp_path / 'second'}" in info
    assert "no CUDA" in info


def test_editable_install_works(source: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "editable")
    options = ("install", "--no-deps", "--no-index", "--no-build-isolation", "-e", str(source))
    pip(python, *options, cwd=tmp_path)
    done = run([str(python), "-c", ROUND_TRIP], tmp_path)
    assert done.stdout.strip().startswith(str(source))
    info = run([str(python), "-m", "qlora_kernels", "info"], tmp_path).stdout
    assert f"native library: {source / 'qlora_kernels' / 'libqlora_kernels.so'}" in info


def test_install_without_a_compiler_runs_on_the_reference(source: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "bare")
    options = ("install", "--no-deps", "--no-index", "--no-build-isolation", str(source))
    pip(python, *options, cwd=tmp_path, CXX="no-such-compiler")
    run([str(python), "-c", ROUND_TRIP], tmp_path)
    info = run([str(python), "-m", "qlora_kernels", "info"], tmp_path).stdout
    assert "missing: no C++ compiler was found when the package was installed" in info
    assert "tried no-such-compiler" in info


def test_compiler_error_stops_the_install(tmp_path: Path) -> None:
    source = copy_sources(tmp_path)
    shutil.rmtree(source / "csrc" / "kernels_cpu")
    (source / "csrc" / "kernels_cpu").mkdir()
    (source / "csrc" / "kernels_cpu" / "broken.cpp").write_text("int broken() { return absent; }\n")
    python = make_environment(tmp_path / "broken")
    options = ("install", "--no-deps", "--no-index", "--no-build-isolation", str(source))
    output = pip(python, *options, cwd=tmp_path, check=False)
    assert not output.startswith("0\n")
    assert "absent" in output
    assert "qlora_kernels: failed with status" in output


def build_extension(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return run(command, source, check=False, **variables)


def test_requested_cuda_build_without_nvcc_is_an_error(source: Path, tmp_path: Path) -> None:
    done = build_extension(source, QLK_BUILD_CUDA="1", PATH="/usr/bin:/bin", CUDA_HOME="/nowhere")
    if shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("nvcc is beside the C++ compiler here")
    assert done.returncode != 0
    assert "QLK_BUILD_CUDA=1, but no nvcc was found" in done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"QLK_BUILD_CUDA": "yes"}, "QLK_BUILD_CUDA must be 0, 1 or auto, got 'yes'"),
        ({"QLK_BUILD_CUDA": "1", "CXX": "no-such-compiler"}, "no C++ compiler was found"),
    ],
)
def test_bad_build_request_is_an_error(
    source: Path, variables: dict[str, str], message: str
) -> None:
    done = build_extension(source, **variables)
    assert done.returncode != 0
    assert message in done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_unknown_cuda_arch_is_an_error(source: Path) -> None:
    done = build_extension(source, QLK_BUILD_CUDA="1", QLK_CUDA_ARCHS="42")
    assert done.returncode != 0
    assert "QLK_CUDA_ARCHS must name targets of" in done.stdout
    assert "got '42'" in done.stdout
