"""Builds the one native library of the package; all metadata is in pyproject.toml.

`libqlora_kernels.so` holds the C++ kernels (`csrc/kernels_cpu`), the CUDA kernels (`csrc/kernels`,
where an nvcc is found) and their bindings (`csrc/bindings`). It is written against PyTorch's
stable ABI and contains no Python, so one file serves every Python and every torch >= 2.10, and
wheels are tagged py3-none-<platform>. Objects and their dependency files stay under build/native:
a second build compiles only what changed.

Read from the environment:

    QLK_BUILD_CUDA   auto (default): CUDA kernels if there is an nvcc; 1: none is an error; 0: off
    QLK_CUDA_ARCHS   narrows the CUDA targets, for instance "90a" or "80;90a"; sources named *_sm90
                     have one of their own
    QLK_BUILD_WERROR 1: compiler warnings are errors
    CXX, NVCC        the compilers, if not the c++/g++/clang++ and nvcc that PATH finds first

Without any C++ compiler the package installs without the library and runs on the reference
backend; `python -m qlora_kernels info` then shows the reason this file leaves behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "native"
LIBRARY = "libqlora_kernels.so"
NOT_BUILT = "_not_built.txt"

# Torch 2.10, the floor in pyproject.toml: the oldest release whose stable ABI has every call used.
TORCH_TARGET_VERSION = "0x020a000000000000"
# Default CUDA targets; those that the nvcc at hand does not know are left out.
CUDA_ARCHS = ("80", "86", "89", "90a", "100a", "120")

# No -march: each kernel selects its instruction set by target attributes and is chosen at run time.
# Contraction off: rounding order is part of the contract, a fused multiply-add is always explicit.
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
CXX_FLAGS += ["-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


def fail(message: str) -> SystemExit:
    """An error that stops pip with a readable last line."""
    return SystemExit(f"qlora_kernels: {message}")


def find_cxx() -> list[str] | None:
    """The C++ compiler as a command, or None; CXX, if set, is the only candidate."""
    chosen = os.environ.get("CXX")
    for candidate in [chosen] if chosen else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


def find_nvcc() -> str | None:
    """The nvcc that the CUDA kernels are built with, or None where QLK_BUILD_CUDA asks for none."""
    switch = os.environ.get("QLK_BUILD_CUDA", "auto")
    if switch not in ("0", "1", "auto"):
        raise fail(f"QLK_BUILD_CUDA must be 0, 1 or auto, got {switch!r}")
    if switch == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (os.environ.get("NVCC"), "nvcc", f"{home}/bin/nvcc"):
        found = candidate and shutil.which(candidate)
        if found:
            return str(Path(found).resolve())
    if switch == "1":
        raise fail("QLK_BUILD_CUDA=1, but no nvcc was found (looked at NVCC, PATH, CUDA_HOME)")
    return None


def cuda_archs(nvcc: str) -> list[str]:
    """The targets to build: the defaults that this nvcc knows, or what QLK_CUDA_ARCHS names."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"compute_(\d+)", listed.stdout))
    asked = [arch for arch in re.split(r"[;, ]+", os.environ.get("QLK_CUDA_ARCHS", "")) if arch]
    for arch in asked:
        if not re.fullmatch(r"\d+[af]?", arch) or arch.rstrip("af") not in known:
            raise fail(
                f"QLK_CUDA_ARCHS must name targets of {nvcc} ({sorted(known)}), got {arch!r}"
            )
    return asked or [arch for arch in CUDA_ARCHS if arch.rstrip("a") in known]


def gencode_flags(archs: list[str]) -> list[str]:
    """One cubin per target, and PTX of the newest portable one for GPUs not yet made."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdigit()]
    if portable:
        newest = max(portable, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def torch_root() -> Path:
    """Where torch's headers and libraries are; found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise fail("torch must be installed to build the native library (see `make setup`)")
    return Path(spec.origin).parent


@dataclass(frozen=True)
class CompileUnit:
    """One source, the object it becomes, and the command for it without its output arguments."""

    source: Path
    command: tuple[str, ...]

    @property
    def object(self) -> Path:
        """Named after the command as well: other flags or another torch never reuse an object."""
        digest = hashlib.sha256("\0".join(self.command).encode()).hexdigest()[:12]
        return OBJECTS / f"{self.source.parent.name}-{self.source.name}-{digest}.o"

    def is_current(self) -> bool:
        dependencies = self.object.with_suffix(".d")
        if not (self.object.exists() and dependencies.exists()):
            return False
        built = self.object.stat().st_mtime_ns
        _, _, listed = dependencies.read_text().partition(":")
        paths = [Path(path) for path in shlex.split(listed.replace("\\\n", " "))]
        return all(path.exists() and path.stat().st_mtime_ns <= built for path in paths)

    def compile(self) -> None:
        partial = self.object.with_suffix(".partial.o")
        dependencies = str(self.object.with_suffix(".d"))
        started = time.time()
        said = run(
            [*self.command, "-MD", "-MF", dependencies, "-c", str(self.source), "-o", str(partial)]
        )
        # Kept for the tests: a warning, or what ptxas made slower than it was written.
        self.object.with_suffix(".log").write_text(said)
        # Dated from the start, so that a header saved during the compilation counts as newer.
        os.utime(partial, (started, started))
        partial.replace(self.object)


def run(command: list[str]) -> str:
    """Runs a compiler and returns what it says; on failure its whole output is the error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        sys.stderr.write(done.stdout)
    if done.returncode != 0:
        raise fail(f"failed with status {done.returncode}: {shlex.join(command)}")
    return done.stdout


def compile_units(cxx: list[str], nvcc: str | None) -> list[CompileUnit]:
    """Everything to compile. CUDA adds the .cu units and the cuda_* bindings, and library.cpp
    reports it."""
    werror = os.environ.get("QLK_BUILD_WERROR") == "1"
    include = f"-I{ROOT / 'csrc' / 'include'}"
    torch_include = [
        "-isystem",  # No warnings from torch's headers.
        f"{torch_root() / 'include'}",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]
    host = [*cxx, *CXX_FLAGS, *(["-Werror"] if werror else []), include]
    version = f'-DQLK_BUILT_WITH_TORCH="{importlib.metadata.version("torch")}"'
    with_cuda = ["-DQLK_WITH_CUDA"] if nvcc else []

    units = []
    for source in sorted(ROOT.glob("csrc/kernels_cpu/*.cpp")):
        units.append(CompileUnit(source, tuple(host)))
    for source in sorted(ROOT.glob("csrc/bindings/*.cpp")):
        if source.name.startswith("cuda_") and not nvcc:
            continue  # Its launchers are in the .cu units.
        reports_build = source.name == "library.cpp"
        extra = [version, *with_cuda] if reports_build else []
        units.append(CompileUnit(source, (*host, *torch_include, *extra)))
    if nvcc:
        archs = cuda_archs(nvcc)
        device = [nvcc, *NVCC_FLAGS, *(["-Werror=all-warnings"] if werror else []), include]
        if "CXX" in os.environ:
            device += ["-ccbin", cxx[0]]
        device.append(f'-DQLK_CUDA_ARCHS="{" ".join(archs)}"')
        for source in sorted(ROOT.glob("csrc/kernels/*.cu")):
            # Instructions of sm_90a alone. Always built: the bindings link against its launchers.
            own = ["90a"] if source.stem.endswith("_sm90") else archs
            units.append(CompileUnit(source, (*device, *gencode_flags(own))))
    return units


def link_command(cxx: list[str], nvcc: str | None, objects: list[Path]) -> list[str]:
    """Links against libtorch_cpu by name alone: at load it is the one torch has already loaded."""
    command = [*cxx, "-fPIC"]
    if nvcc:  # It alone knows where its toolkit keeps the static runtime.
        command = [nvcc, "-cudart=static", *(["-ccbin", cxx[0]] if "CXX" in os.environ else [])]
    command += ["-shared", *map(str, objects), f"-L{torch_root() / 'lib'}"]
    # -z defs: a function that no file defines fails here, not when the library is loaded.
    linker_flags = ["--as-needed", "-soname", LIBRARY, "-z", "noexecstack", "-z", "defs"]
    for flag in linker_flags:
        command += ["-Xlinker", flag]
    return [*command, "-ltorch_cpu"]


@contextlib.contextmanager
def build_lock() -> Iterator[None]:
    """Two builds in one tree take turns."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with (OBJECTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_library() -> Path:
    """Brings build/native/libqlora_kernels.so up to date and returns its path."""
    cxx = find_cxx()
    assert cxx is not None
    nvcc = find_nvcc()
    library = OBJECTS / LIBRARY
    with build_lock():
        units = compile_units(cxx, nvcc)
        stale = [unit for unit in units if not unit.is_current()]
        # Slowest first: nvcc compiles each file once per target.
        stale.sort(key=lambda unit: unit.source.suffix != ".cu")
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for unit, _ in zip(stale, pool.map(CompileUnit.compile, stale), strict=True):
                sys.stderr.write(f"compiled {unit.source.relative_to(ROOT)}\n")

        objects = [unit.object for unit in units]
        command = link_command(cxx, nvcc, objects)
        stamp = OBJECTS / "link.txt"
        linked = shlex.join(command)
        if stale or not library.exists() or not stamp.exists() or stamp.read_text() != linked:
            partial = OBJECTS / f"{LIBRARY}.partial"
            run([*command, "-o", str(partial)])
            partial.replace(library)
            stamp.write_text(linked)
            sys.stderr.write(f"linked {library.relative_to(ROOT)}\n")
    return library


def reason_not_built() -> str | None:
    """Why this machine gets no library at all, or None."""
    if not sys.platform.startswith("linux"):
        return f"the native library is built on Linux only, this is {sys.platform}"
    if find_cxx() is None:
        if os.environ.get("QLK_BUILD_CUDA") == "1":
            raise fail("QLK_BUILD_CUDA=1, but no C++ compiler was found")
        tried = os.environ.get("CXX") or "c++, g++, clang++"
        return f"no C++ compiler was found when the package was installed (tried {tried})"
    return None


class BuildNativeLibrary(build_ext):
    """Puts the library, or the reason there is none, next to the package's Python files."""

    def get_ext_filename(self, fullname: str) -> str:
        """The same name for every Python: this is not a Python module."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib)
        package = package / "qlora_kernels"
        package.mkdir(parents=True, exist_ok=True)
        reason = reason_not_built()
        if reason:
            (package / LIBRARY).unlink(missing_ok=True)
            (package / NOT_BUILT).write_text(reason + "\n")
            sys.stderr.write(f"warning: {reason}; only the reference backend will run\n")
            return
        library = build_library()
        (package / NOT_BUILT).unlink(missing_ok=True)
        target = package / LIBRARY
        if target.exists() and target.stat().st_mtime_ns == library.stat().st_mtime_ns:
            return
        # By rename: a process that has the old file mapped keeps it.
        partial = package / f".{LIBRARY}.{os.getpid()}"
        shutil.copy2(library, partial)
        partial.replace(target)


class FreshBuild(build):
    """Starts from an empty build/lib: setuptools would ship modules deleted since then."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class StableWheel(bdist_wheel):
    """Tags the wheel for the platform only: the library depends on no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # Optional: setuptools then accepts that no file appears; a failed compilation still stops it.
    ext_modules=[Extension("qlora_kernels.libqlora_kernels", sources=[], optional=True)],
    cmdclass={"build": FreshBuild, "build_ext": BuildNativeLibrary, "bdist_wheel": StableWheel},
)
