"""Builds the CUDA kernels for the emulation (or, with nvcc, for a GPU) and runs them.

A runner is one executable of all csrc/kernels, the engine and the launchers' wrappers beside this
file; it serves requests until a kernel does something wrong, which ends it with a report. Objects
are kept under build/emulation by the hash of everything that went into them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.native_library import built_object

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OBJECTS = ROOT / "build" / "emulation"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

# build_probe.cu asks the CUDA runtime about a real GPU.
NOT_EMULATED = ("build_probe.cu",)

# plain: many orders, fast. memory: out of bounds, misaligned, undefined. races: TSAN.
MODES: dict[str, list[str]] = {
    "plain": [],
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-fsanitize=thread"],
}
_ENGINE = (
    "engine.cpp",
    "exchange.cpp",
    "fibers.cpp",
    "launches.cpp",
    "mbarriers.cpp",
    "shared_memory.cpp",
    "warpgroups.cpp",
)
# The engine's own bookkeeping is no race of a kernel's: no sanitizer, and no loop of it becomes a
# memmove, which TSAN would intercept.
_ENGINE_FLAGS = {
    mode: ["-fno-tree-loop-distribute-patterns", *define]
    for mode, define in {"plain": [], "memory": ["-DQLK_ASAN"], "races": ["-DQLK_TSAN"]}.items()
}
# What takes the least time in all, compiling and running: nothing here depends on the level. A
# wrong kernel runs one check until it fails; unoptimized, TSAN forgets what it should compare.
_LEVELS = {"plain": "-O1", "memory": "-O1", "races": "-O1"}
_MUTANT_LEVELS = {"plain": "-O0", "memory": "-O0", "races": "-O1"}
_FLAGS = ["-std=c++20", "-g1", "-ffp-contract=off", "-fno-strict-aliasing"]
_FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Werror"]
_FLAGS += ["-DQLK_EMULATE_CUDA"]
_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:exitcode=66:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
}


def why_no_emulation() -> str | None:
    """Why this machine cannot run the emulation, or None."""
    if CXX is None:
        return "no C++ compiler on this machine"
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the emulation's fibers are written for x86-64 Linux"
    return None


class KernelStopped(AssertionError):
    """The runner ended in the middle of a request: what it or a sanitizer said about it."""


class Runner:
    """A running executable; see `call`."""

    def __init__(self, executable: Path, prefix: tuple[str, ...] = ()) -> None:
        self._command = [*prefix, str(executable)]
        self._process: subprocess.Popen[bytes] | None = None
        # Lives as long as the runner.
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115

    def call(
        self,
        function: str,
        *,
        seed: int = 0,
        integers: Mapping[str, int] | None = None,
        reals: Mapping[str, float] | None = None,
        inputs: Mapping[str, torch.Tensor | None] | None = None,
        outputs: Mapping[str, torch.Tensor] | None = None,
        changed: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run a launcher; returns the contents of `outputs` and `changed` afterwards.

        Args:
            function: the name it is registered under in a run_*.cpp.
            seed: the order in which threads and blocks run; 0 is in order.
            inputs: read by the kernel; None is a null pointer.
            outputs: tensors whose shape and dtype the results have; they start as 0xFF bytes.
            changed: read and written.

        Raises:
            KernelStopped: a sanitizer's or the emulation's report.
            AssertionError: the launcher returned an error.
        """
        lines, payload, results = [f"run {function} {seed}"], [], {}
        lines += [f"integer {name} {int(value)}" for name, value in (integers or {}).items()]
        lines += [f"real {name} {value!r}" for name, value in (reals or {}).items()]
        for kind, tensors in (("in", inputs), ("inout", changed), ("out", outputs)):
            for name, tensor in (tensors or {}).items():
                if tensor is None:
                    continue
                data = tensor.detach().contiguous()
                lines.append(f"{kind} {name} {data.numel() * data.element_size()}")
                if kind != "out":
                    payload.append(_bytes(data))
                if kind != "in":
                    results[name] = data
        request = "\n".join([*lines, "end\n"]).encode() + b"".join(payload)
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._stopped() from None
        answer = process.stdout.readline().split()
        if len(answer) != 2 or answer[0] != b"done":
            raise self._stopped()
        read = {}
        for name, data in results.items():
            size = data.numel() * data.element_size()
            content = process.stdout.read(size)
            if len(content) != size:
                raise self._stopped()
            flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else data
            read[name] = (flat.view(data.dtype) if size else data.clone()).reshape(data.shape)
        assert answer[1] == b"0", f"{function} returned error {answer[1].decode()}"
        return read

    def close(self) -> None:
        """End the process; a leak that a sanitizer reports at the end raises KernelStopped."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait() != 0:
            raise self._stopped()
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._complaints.seek(0)
            self._complaints.truncate()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, **_ENVIRONMENT},
            )
        return self._process

    def _stopped(self) -> KernelStopped:
        assert self._process is not None
        self._process.stdin = None
        status = self._process.wait()
        self._process = None
        self._complaints.seek(0)
        report = self._complaints.read().decode(errors="replace")
        return KernelStopped(f"the runner ended with status {status}\n{report[:6000]}")


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def _sources(csrc: Path) -> list[Path]:
    kernels = [p for p in sorted(csrc.glob("kernels/*.cu")) if p.name not in NOT_EMULATED]
    return [*kernels, *sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.cu"))]


class _Contents:
    """What objects are named after: a source with all that it includes."""

    def __init__(self, csrc: Path) -> None:
        self.folders = (csrc / "include", HERE / "include", HERE)
        self._read: dict[Path, tuple[bytes, list[Path]]] = {}

    def digest(self, source: Path) -> bytes:
        """Of names and contents; where the files lie does not matter."""
        seen: dict[Path, None] = {}
        left = [source]
        while left:
            path = left.pop()
            if path not in seen:
                seen[path] = None
                left += self._file(path)[1]
        digest = hashlib.sha256()
        for path in seen:
            digest.update(path.name.encode() + b"\0" + self._file(path)[0])
        return digest.digest()

    def _file(self, path: Path) -> tuple[bytes, list[Path]]:
        if path not in self._read:
            content = path.read_bytes()
            names = re.findall(rb'^ *# *include "([^"]+)"', content, re.M)
            found = [
                folder / name.decode()
                for name in names
                for folder in (path.parent, *self.folders)
                if (folder / name.decode()).is_file()
            ]
            self._read[path] = content, found
        return self._read[path]


def _compile(command: list[str], source: Path, contents: _Contents) -> Path:
    """The object of one source, from build/emulation if nothing that it depends on changed."""
    key = hashlib.sha256(" ".join(command).encode() + contents.digest(source))
    result = OBJECTS / f"{source.stem}-{key.hexdigest()[:16]}.o"
    with _turn(result):
        if not result.exists():
            partial = result.with_suffix(f".{os.getpid()}.o")
            include = [f"-I{folder}" for folder in contents.folders]
            _run([*command, *include, "-c", str(source), "-o", str(partial)])
            partial.replace(result)
    return result


@contextlib.contextmanager
def _turn(result: Path) -> Iterator[None]:
    """Processes that want the same file take turns: the first makes it."""
    with result.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(
    commands: Mapping[Path, list[str]],
    link: list[str],
    contents: _Contents,
    built: Sequence[Path] = (),
) -> Path:
    """Compiles and links; `built` are further objects."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda item: _compile(item[1], item[0], contents), commands.items())
        )
    dates = [str(path.stat().st_mtime_ns) for path in built]
    objects += built
    key = hashlib.sha256(" ".join([*link, *map(str, objects), *dates]).encode()).hexdigest()[:16]
    executable = OBJECTS / f"runner-{key}"
    with _turn(executable):
        if not executable.exists():
            partial = executable.with_suffix(f".{os.getpid()}")
            _run([*link, *map(str, objects), "-o", str(partial)])
            partial.replace(executable)
    return executable


def build_emulated(mode: str, csrc: Path = ROOT / "csrc") -> Path:
    """The runner of the kernels in `csrc` for one of `MODES`. Sources that differ from this tree's
    are compiled in less time, to code that takes more."""
    assert CXX is not None
    contents, ours = _Contents(csrc), _Contents(ROOT / "csrc")
    commands = {}
    for source in _sources(csrc):
        is_kernel = source.is_relative_to(csrc)
        own = ROOT / "csrc" / source.relative_to(csrc) if is_kernel else source
        changed = contents.digest(source) != ours.digest(own)
        level = (_MUTANT_LEVELS if changed else _LEVELS)[mode]
        sanitizer = _ENGINE_FLAGS[mode] if source.name in _ENGINE else MODES[mode]
        commands[source] = [CXX, *_FLAGS, level, *sanitizer, "-x", "c++"]
    return _build(commands, [CXX, *MODES[mode]], contents)


def build_for_gpu(arch: str) -> Path:
    """The same runner for a GPU of e.g. "90a"; its functions run on the current device. Kernels are
    the last build's where they are of these sources. Sources named *_sm90 are for that target
    alone, and no others have what they define."""
    assert NVCC is not None
    flags = ["-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    commands, built = {}, []
    for source in _sources(ROOT / "csrc"):
        if source.name in _ENGINE or (arch != "90a" and source.stem.endswith("_sm90")):
            continue
        if made := built_object(source, arch):
            built.append(made)
        else:
            commands[source] = [NVCC, *flags, '-DQLK_CUDA_ARCHS=""', "-x", "cu"]
    return _build(commands, [NVCC, *flags], _Contents(ROOT / "csrc"), built)


@functools.cache
def _without_randomised_addresses() -> tuple[str, ...]:
    """TSAN of gcc 12 finds no place for its shadow where a system randomises many address bits."""
    setarch = shutil.which("setarch")
    return (setarch, "-R") if setarch else ()


def start(mode: str, executable: Path) -> Runner:
    """A runner that waits for its first call."""
    return Runner(executable, _without_randomised_addresses() if mode == "races" else ())
